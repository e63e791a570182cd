"""Processes of one start find each other, whatever earlier starts left in torchrun's store. Threads stand for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError  # until Python 3.11 another than the built-in one
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from minillm.log import UserError
from minillm.rendezvous import Meeting, meet


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """torchrun's store, and the variables it gives its processes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    for name, value in (("ADDR", "127.0.0.1"), ("PORT", str(store.port))):
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    yield store


def start(size: int) -> list[Meeting]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: meet(rank, size, patience=20), range(size)))


def test_every_start_has_a_part_of_the_store_of_its_own(launcher: TCPStore) -> None:
    first = start(3)
    for rank, meeting in enumerate(first):
        meeting.store.set(f"address/{rank}", "old")
    second = start(3)
    assert not any(second[0].store.check([f"address/{rank}"]) for rank in range(3))
    second[1].store.set("address/1", "new")
    assert second[2].store.get("address/1") == b"new"
    assert first[0].store.get("address/1") == b"old"


def test_one_who_came_to_an_earlier_start_and_died_does_not_stand_for_its_successor(launcher: TCPStore) -> None:
    with pytest.raises(UserError, match="rank 0 of 2 processes did not come"):
        meet(1, 2, patience=0.1)
    with ThreadPoolExecutor(2) as pool:
        zero = pool.submit(meet, 0, 2, 20)  # finds the dead one's token
        with pytest.raises(TimeoutError):
            zero.result(timeout=0.3)
        one = pool.submit(meet, 1, 2, 20)
        zero.result().store.set("same", "yes")
        assert one.result().store.get("same") == b"yes"


def test_a_job_has_been_restarted_once_it_has_trained(launcher: TCPStore) -> None:
    assert [meeting.restarted for meeting in start(2)] == [False, False]
    again = start(2)  # the first died before its first step: there is nothing to go on from
    assert [meeting.restarted for meeting in again] == [False, False]
    again[0].mark_training()
    assert [meeting.restarted for meeting in start(2)] == [True, True]


def test_a_restart_is_known_where_the_store_went_down_with_its_machine(
    launcher: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [meeting.restarted for meeting in start(2)] == [True, True]


def test_who_does_not_come_is_named(launcher: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rank 1, 2 of 3 processes did not come"):
        meet(0, 3, patience=0.1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="MASTER_PORT"):
        meet(0, 3)
