"""The command line as the tests run it, and the few fits they share."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from typer.testing import CliRunner

from hfdtl_bayes.cli.app import app
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path

STORE = sample_store_path()
TARGET_STEPS = STORE / TARGET / "steps.parquet"
FEW_DRAWS = ("--draws", "100", "--tune", "150", "--chains", "2")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def run(*words: object) -> Ran:
    """Run a command in this process; an exception nobody meant is raised here."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def done(*words: object) -> Ran:
    """Run a command that must succeed."""
    ran = run(*words)
    assert ran.code == 0, ran.err
    return ran


@dataclass(frozen=True)
class Chain:
    """Donors fitted and the target calibrated through the command line, with few draws."""

    folder: Path
    fitted: Ran
    calibrated: Ran

    @property
    def donors(self) -> Path:
        return self.folder / "donors.nc"

    @property
    def target(self) -> Path:
        return self.folder / "target.nc"


def calibrate_target(donors: Path, out: Path, *words: object) -> Ran:
    chosen = ("--regimes", "calib,load0.15,load0.5", "--max-rows", 300, *FEW_DRAWS)
    return done("calibrate", donors, STORE, "--config", TARGET, "--out", out, "--json", *chosen, *words)


@cache
def chain() -> Chain:
    folder = Path(tempfile.mkdtemp(prefix="hfdtl-cli-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fitted = done("fit", STORE, "--donors", ",".join(DONORS), "--out", folder / "donors.nc", "--json", *FEW_DRAWS)
    return Chain(folder, fitted, calibrate_target(folder / "donors.nc", folder / "target.nc"))


def configuration_file(path: Path, config_id: str = "never-seen", *, like: str = TARGET, **engine: object) -> Path:
    """Write the YAML of a configuration like one of the sample's, under another name and with other engine settings."""
    data = yaml.safe_load((STORE / like / "configuration.yaml").read_text())
    data["config_id"] = config_id
    data["engine"].update(engine)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def steps_of(config_id: str) -> pd.DataFrame:
    return pd.read_parquet(STORE / config_id / "steps.parquet")


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
