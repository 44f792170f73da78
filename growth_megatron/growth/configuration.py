"""A run's configuration with its growths checked: what all commands load.

Owns: handing the rules of growth to the reader of configurations, which stands below and knows none.
Does not own: reading and merging (``config.load``), the rules (``growth.operators``, ``growth.conditions``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from growth_megatron.config.load import LoadedConfig, read_config
from growth_megatron.growth import conditions


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, merge and validate a run's configuration, growths included (``config.load.read_config``).

    Raises:
        ConfigError: everything that is wrong, one ``file:line: section.key: ...`` a line.
    """
    return read_config(path, overrides, growth=conditions)
