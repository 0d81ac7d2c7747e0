"""Seats before FLORA: nobody who leaves takes one along."""

import asyncio

import pytest

from tracker.flora.request_limit import Seats


@pytest.mark.parametrize("leaving", [1, 3])
async def test_a_seat_given_back_while_others_leave_goes_to_who_stays(leaving: int) -> None:
    """Where those at the front of the line are cancelled in the moment in which a seat becomes
    free, as at a shutdown, it goes to the next, and back to all afterwards."""
    seats = Seats(1)
    await seats.take(fresh=False)
    gone = [asyncio.create_task(seats.take(fresh=False)) for _ in range(leaving)]
    stays = asyncio.create_task(seats.take(fresh=False))
    await asyncio.sleep(0)
    for each in gone:
        each.cancel()
    seats.give_back()
    async with asyncio.timeout(5):
        await stays
        answers = await asyncio.gather(*gone, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in answers)
        seats.give_back()
        await seats.take(fresh=True)


async def test_a_seat_given_to_one_who_leaves_is_passed_on() -> None:
    """Who is cancelled in the moment in which the seat was given passes it on."""
    seats = Seats(1)
    await seats.take(fresh=False)
    leaves = asyncio.create_task(seats.take(fresh=True))
    stays = asyncio.create_task(seats.take(fresh=False))
    await asyncio.sleep(0)
    seats.give_back()
    leaves.cancel()
    async with asyncio.timeout(5):
        await stays
