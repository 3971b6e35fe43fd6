"""The base of the strategies of this package: a rule for what follows the records so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from amalgam.meta.periods import INITIAL, Finish, Period, Record


@dataclass(frozen=True)
class Place:
    """Which period comes next, and from which checkpoint; the fields are :class:`Period`'s."""

    stage: int = 0
    period: int = 0
    repeat: int = 0
    begin_from: str = INITIAL


class RuleByRecords(ABC):
    """A strategy that is a rule for what follows the last of some records.

    :meth:`next` replays the rule over the records: it raises if one of them is not of the period
    that the rule would have chosen.
    """

    @property
    def goes_back(self) -> bool:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return True

    @property
    def meta_steps(self) -> int | None:
        """See :class:`amalgam.meta.periods.Strategy`."""
        return None

    def next(self, records: Sequence[Record]) -> Period | Finish:
        """See :class:`amalgam.meta.periods.Strategy`."""
        place: Place | Finish = Place()
        for index, record in enumerate(records):
            if isinstance(place, Finish):
                raise ValueError(
                    f"records must end with the last period, not go on with {record.name}"
                )
            expected = (place.stage, place.period, place.repeat)
            if (record.stage, record.period, record.repeat) != expected:
                wanted = self._period(place).name
                raise ValueError(
                    f"records must be of this strategy: {record.name} stands where it does {wanted}"
                )
            place = self._after(records[: index + 1])
        return place if isinstance(place, Finish) else self._period(place)

    @abstractmethod
    def _after(self, records: Sequence[Record]) -> Place | Finish:
        """What follows the last of one or more records."""

    @abstractmethod
    def _period(self, place: Place) -> Period:
        """The period to train at a place."""
