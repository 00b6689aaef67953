"""Whether a page of a large directory has attributes depends on who looked at the page before."""

import ctypes

import pyfuse3
import pytest

from fuse import bare
from fuse.listing import LARGE, SHARE, Listing, Listings


def names_only(listing, pages):
    """Nobody looks."""
    for n in range(pages):
        assert listing.turn(), n
        listing.shown(100)


def test_who_reads_names_only_is_shown_names_only():
    names_only(Listing(7), 5)


def follow_who_looks(listing):
    """It gets attributes as long as it looks."""
    assert listing.turn()
    listing.shown(100)
    for n in range(100 // SHARE - 1):
        listing.looked_up(b"%d" % n)
    assert listing.turn()  # one in four it must be
    listing.shown(100)
    for n in range(100 // SHARE):
        listing.looked_up(b"%d" % n)
    for page in range(3):
        assert not listing.turn()
        listing.shown(1, b"first%d" % page)
        listing.looked_up(b"first%d" % page)
    assert not listing.turn()
    listing.shown(1, b"first")
    for n in range(100):  # somebody makes files meanwhile
        listing.looked_up(b"other%d" % n)
    names_only(listing, 3)


def test_who_looks_gets_attributes_as_long_as_it_looks():
    follow_who_looks(Listing(7))


class AnyLookup(Listing):
    """Takes any name for the one that was shown bare."""

    __slots__ = ()

    def looked_up(self, name):
        self._looked += 1


class FirstLookup(Listing):
    """One lookup is enough."""

    __slots__ = ()

    def turn(self):
        self._looked *= SHARE
        return super().turn()


class Deaf(Listing):
    """Shows attributes to nobody."""

    __slots__ = ()

    def looked_up(self, name):
        pass


@pytest.mark.parametrize("mutant", [AnyLookup, FirstLookup, Deaf])
def test_broken_judgements_are_seen(mutant):
    with pytest.raises(AssertionError):
        follow_who_looks(mutant(7))


def test_readers_of_large_directories_are_told_apart():
    listings = Listings()
    listings.begin(1, 7, LARGE)
    assert listings.get(1) is None
    listings.begin(1, 7, LARGE + 1)
    listings.begin(2, 7, LARGE + 1)
    listings.begin(3, 8, LARGE + 1)
    assert len(listings) == 3
    for fh in (1, 2, 3):
        listings.get(fh).turn()
        listings.get(fh).shown(2)
    listings.looked_up(7, b"x")
    listings.looked_up(9, b"x")
    assert [listings.get(fh).turn() for fh in (1, 2, 3)] == [False, False, True]
    listings.begin(1, 7, LARGE + 1)  # rewinddir
    assert listings.get(1).turn()
    for fh in (1, 2, 3, 4):
        listings.end(fh)
    assert (len(listings), listings._by_ino) == (0, {})


def test_a_bare_entry_has_an_inode_and_a_type_and_no_node():
    assert bare.SUPPORTED, "this version of pyfuse3 lays out its entries in another way"
    entry = bare.BareEntry()
    filled = entry.fill(0x1234_5678_9ABC_DEF0, 8)
    assert filled is entry.fill(0x1234_5678_9ABC_DEF0, 8)
    assert (filled.st_ino, filled.st_mode) == (0, 0o100000)  # the node's number, which is read
    memory = ctypes.string_at(id(filled), pyfuse3.EntryAttributes.__basicsize__)
    assert memory.count((0x1234_5678_9ABC_DEF0).to_bytes(8, "little")) == 1
