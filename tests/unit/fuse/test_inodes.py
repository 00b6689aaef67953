"""Names in the table of inodes follow renames, so that others' changes reach the kernel."""

from fuse.inodes import InodeTable


def test_a_renamed_inode_is_found_by_its_new_name_only():
    table = InodeTable()
    table.looked_up(10, b"key1", 1, b"old")
    assert table.find(b"key1", b"old") == 10
    assert table.find(b"key1", b"other") == 0
    assert table.find(b"none", b"old") == 0
    table.moved(10, b"key2", 5, b"new")
    assert table.find(b"key1", b"old") == 0
    assert table.find(b"key2", b"new") == 10
    assert table.names(b"key1") == []
    assert table.names(b"key2") == [b"new"]
    assert table.places() == [(5, b"new")]
    assert table.forget(10, 1)
    assert table.names(b"key2") == []


def test_exchanged_inodes_keep_one_name_each():
    table = InodeTable()
    table.looked_up(10, b"a", 1, b"a")
    table.looked_up(11, b"b", 1, b"b")
    table.moved(10, b"b", 1, b"b")
    table.moved(11, b"a", 1, b"a")
    assert (table.find(b"a", b"a"), table.find(b"b", b"b")) == (11, 10)
    table.forget(10, 1)
    table.forget(11, 1)
    assert table.places() == []


def test_what_the_kernel_does_not_hold_does_not_move():
    table = InodeTable()
    table.moved(10, b"a", 1, b"a")
    assert table.find(b"a", b"a") == 0
