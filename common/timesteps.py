"""The place of this command until version 2; says what to type now."""

from common.errors import moved

moved("timesteps")
