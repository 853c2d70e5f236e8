# SPDX-License-Identifier: Apache-2.0
"""Settles how a data set is asked, and writes down everything that the answers depend on."""

from starkv.errors import UsageError
from starkv.evaluation.files import data_hash
from starkv.evaluation.prompts import most_screenshots
from starkv.evaluation.records import KvSettings, Settings
from starkv.evaluation.samples import Level, Loaded
from starkv.evaluation.suites.base import Suite
from starkv.manifest import Manifest, PromptDialect
from starkv.runtime.kv.policy import KvPolicy


def parse_level(name: str) -> Level:
    """Check a level's name.

    Raises:
        UsageError: no such level.
    """
    if name == "high":
        return "high"
    if name == "low":
        return "low"
    raise UsageError(f"unknown level {name!r}; known: high, low")


def default_dialect(suite: Suite, manifest: Manifest) -> PromptDialect:
    """Words of the prompt where the user doesn't say: the data set's for models that know UI-TARS's prompts,
    the model's own otherwise."""
    return suite.ui_tars_dialect if manifest.prompt.startswith("ui_tars") else manifest.prompt


def settings_of(
    suite: Suite,
    loaded: Loaded,
    manifest: Manifest,
    policy: KvPolicy,
    mode: str,
    level: Level,
    dialect: PromptDialect | None,
    max_new_tokens: int | None,
) -> Settings:
    """Everything that the answers depend on.

    Args:
        suite: the data set.
        loaded: what was read of it.
        manifest: of the engine.
        policy: compression.
        mode: of STaR-KV.
        level: of AndroidControl's instructions.
        dialect: words of the prompt; the default if None.
        max_new_tokens: longest reply; the official driver's if None.
    """
    words = dialect or default_dialect(suite, manifest)
    return Settings(
        suite=suite.name,
        data=data_hash(loaded),
        engine=manifest.name,
        engine_hash=manifest.manifest_sha256,
        kv=KvSettings(
            method=policy.method, mode=mode, budget=policy.budget.ratio, capacity=policy.budget.capacity
        ),
        dialect=words,
        level=level,
        max_new_tokens=max_new_tokens or suite.max_new_tokens,
        images=most_screenshots(words),
    )
