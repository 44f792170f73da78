"""The errors this package raises on purpose, and the exit code of each.

Owns: the exception classes and the documented process exit codes.
Does not own: how they are printed (``growth_megatron.__main__``).
"""

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_STOPPED_EARLY = 75
EXIT_NEXT_LAYOUT = 76
EXIT_NOTHING_VALID = 77
EXIT_INTERRUPTED = 130


class GrowthMegatronError(Exception):
    """A fault whose message names the wrong value, what is allowed, and the remedy."""

    exit_code = EXIT_FAULT


class ConfigError(GrowthMegatronError):
    """Bad configuration or command line; raised before any work or collective."""

    exit_code = EXIT_USAGE


class DataError(GrowthMegatronError):
    """A corpus, tokenizer or dataset file that is missing, empty or inconsistent."""

    exit_code = EXIT_USAGE


class CheckpointError(GrowthMegatronError):
    """A checkpoint that is missing, incomplete or does not fit what is to load it."""

    exit_code = EXIT_USAGE


class DamagedError(CheckpointError):
    """Contents of a checkpoint that are not what was saved, though its manifest is sound and sizes are right."""


class NothingValidError(CheckpointError):
    """Saved state exists but none of it is intact, so there is nothing to resume from."""

    exit_code = EXIT_NOTHING_VALID


class GrowthError(GrowthMegatronError):
    """A growth that is impossible or not defined for these two geometries."""

    exit_code = EXIT_USAGE
