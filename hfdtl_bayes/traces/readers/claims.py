"""Whether files are of the configuration they are said to be of."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces.readers.recording import Recording


def short_name(model: str) -> str:
    """Return the name of an LLM without its organisation, case and punctuation: what two spellings have in common."""
    return re.sub(r"[^a-z0-9]", "", model.rstrip("/").rpartition("/")[2].lower())


def check_claims(
    recordings: Sequence[Recording], configuration: ServingConfiguration, served_model_name: str | None = None
) -> None:
    """Refuse recordings of another LLM or other engine settings than the configuration says.

    Parameters
    ----------
    recordings : sequence of Recording
    configuration : ServingConfiguration
    served_model_name : str, optional
        A name the server had for the configuration's LLM.

    Raises
    ------
    InputError
        With the place in the files, what stands there and what the configuration says.
    """
    expected = {short_name(name) for name in (configuration.llm.name, served_model_name) if name}
    problems = []
    for recording in recordings:
        for model, place in recording.claims.models.items():
            if short_name(model) not in expected:
                problems.append(
                    f"{place}: the model is {model!r} but {configuration.config_id} serves {configuration.llm.name!r}; choose the "
                    f"configuration that was recorded, or, if the server had another name for it, give --served-model-name {model!r}"
                )
        for name, (value, place) in recording.claims.values.items():
            ours = getattr(configuration.engine, name)
            if value != ours:
                problems.append(
                    f"{place}: {name} is {value:g} but {configuration.config_id} has {ours}; choose the configuration recorded"
                )
    if problems:
        raise InputError("\n  ".join(["the trace is of another configuration:", *problems]))
