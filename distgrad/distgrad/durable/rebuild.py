"""Any version of the parameters that a data folder goes back to, rebuilt bit for bit; the folder may be in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from distgrad.durable.books import Recovered
from distgrad.durable.data_folder import DataFolder
from distgrad.durable.disk import Disk
from distgrad.durable.inspection import Survey, steadily, survey
from distgrad.durable.recovery import recover
from distgrad.errors import ConfigError, DataDamaged
from distgrad.holder import ParameterHolder
from distgrad.rules import Rule


class Rebuilt(NamedTuple):
    """A version of the parameters.

    Attributes
    ----------
    holder : ParameterHolder
        With parameters, rule and state as they were; close it.
    recovered : Recovered
        What was read for it.
    """

    holder: ParameterHolder
    recovered: Recovered

    @property
    def other_executors(self) -> list[str]:
        """What computed the updates that were repeated here, where it was not what repeated them."""
        begun_with = self.recovered.checkpoint
        if begun_with is not None and begun_with[1] == self.holder.version:
            return []  # they were only read
        return sorted(self.recovered.executors - {self.holder.executor})


def rebuild(
    disk: Disk,
    path: str,
    until: int | None = None,
    *,
    rule: Rule | None = None,
    executor: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rebuilt:
    """Rebuild a version of the parameters from the newest checkpoint before it and the journal behind that.

    Where parameters were replaced, which keeps the version, it is the last state of that version.

    Parameters
    ----------
    disk : Disk
        Where the folder is.
    path : str
        The folder; it is neither locked nor changed.
    until : int, optional
        The version; by default the newest.
    rule : Rule, optional
        The user's own rule, if the parameters were updated by one.
    executor : {"numba", "numpy"}, optional
        What repeats the updates; the same bits are promised only by what computed them.
    on_progress : callable, optional
        Told now and then how many records were carried out, and the version.

    Returns
    -------
    Rebuilt
        The version.

    Raises
    ------
    ConfigError
        If there is no data folder, or no such version in it.
    DataDamaged
        If the journal is damaged on the way to it.
    CheckpointError
        If the folder cannot be read.
    """
    folder = DataFolder(disk, path, read_only=True)

    def look() -> Rebuilt:
        holder = ParameterHolder(rule=rule, executor=executor)
        try:
            return Rebuilt(holder, recover(disk, folder, holder, until=until, on_progress=on_progress))
        except BaseException:
            holder.close()
            raise

    try:
        rebuilt = steadily(look)
    except DataDamaged as damage:
        # That the journal does not reach back so far is no damage.
        lowest, _ = _reach(survey(disk, folder))
        if until is not None and (lowest is None or until < lowest):
            raise _not_there(disk, folder, until) from damage
        damage.hint = f"`distgrad journal {path} --verify` shows all that is damaged"
        raise
    holder = rebuilt.holder
    if (until is not None and holder.version != until) or holder.layout is None:
        holder.close()
        raise _not_there(disk, folder, holder.version if until is None else until)
    return rebuilt


def _not_there(disk: Disk, folder: DataFolder, until: int) -> ConfigError:
    found = survey(disk, folder)
    lowest, highest = _reach(found)
    if lowest is None or highest is None:
        return ConfigError(f"there are no parameters in {folder.path}")
    if found.kinds["decided"] or lowest == highest:
        if lowest <= until <= highest:
            return ConfigError(f"version {until} has no parameters any more: they had been taken away")
        return ConfigError(f"version {until} is not in {folder.path}, which has {lowest} to {highest}")
    known = ", ".join(map(str, sorted({name.version for name, _ in found.checkpoints})))
    return ConfigError(f"version {until} is not in {folder.path}, which has only those of its checkpoints: {known}")


def _reach(found: Survey) -> tuple[int | None, int | None]:
    """Give the oldest and the newest version; None if there is none."""
    versions = [name.version for name, _ in found.checkpoints]
    lowest = min(versions, default=None)
    if found.versions is None:
        return lowest, max(versions, default=None)
    if found.segments[0].segment.first == 1:
        lowest = found.versions[0]
    return lowest, max([found.versions[1], *versions])
