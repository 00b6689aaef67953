import pytest

from dfs import codec
from dfs.cluster.joint import (
    BITMAP_SIZE,
    ChunkProgress,
    Progress,
    bitmap,
    chunks_missing,
    has,
    lacking,
    missing_for_phase_2,
    missing_for_stable,
)
from dfs.cluster.map import CHUNK, METADATA, ClusterMap, Params
from dfs.errors import ConfigError, RemoteProtocolError
from dfs.hashing import PARTITIONS, digest, partition_of
from dfs.testing.joint_cores import PARTITION, VOLUME, member

MAP = ClusterMap.create(bytes(16), map(member, (1, 2, 3)))
ONE = MAP.begin(map(member, (4, 5, 6)), leaving=[1, 2, 3])
TWO = ONE.advance()
ALL = bitmap(range(PARTITIONS))
NONE = bytes(BITMAP_SIZE)


def pushed(*to, bits=ALL):
    return Progress(2, dict.fromkeys(to, bits))


def journal(members, version, held=True, volume=VOLUME):
    return ((volume, members, version, held),)


def test_bitmaps():
    bits = bitmap([0, 9, PARTITIONS - 1])
    assert len(bits) == BITMAP_SIZE
    assert (bits[0], bits[1], bits[-1]) == (1, 2, 128)
    assert [p for p in range(PARTITIONS) if has(bits, p)] == [0, 9, PARTITIONS - 1]


def test_phase_1_is_left_when_two_of_three_have_pushed_to_two():
    assert missing_for_phase_2(ONE, {1: pushed(4, 5), 3: pushed(5, 6)}) == []
    assert missing_for_phase_2(ONE, {1: pushed(4, 5)})
    assert missing_for_phase_2(ONE, {1: pushed(4, 5), 3: pushed(6)})
    assert missing_for_phase_2(ONE, {1: pushed(4, 5), 3: pushed(5, 6, bits=NONE)})
    # pushes to nodes that are no homes count for nothing
    assert missing_for_phase_2(ONE, {1: pushed(4, 5), 3: pushed(1, 2, 6)})


def test_a_report_from_before_the_fence_counts_for_nothing():
    early = Progress(1, {4: ALL, 5: ALL, 6: ALL})
    found = missing_for_phase_2(ONE, {1: pushed(4, 5), 2: early})
    assert found == [
        f"node node2 is still at epoch 1: {PARTITIONS} partitions waiting",
        f"node node3 has not reported: {PARTITIONS} partitions waiting",
    ]


def test_reasons_name_nodes_and_count_partitions():
    most = bitmap(range(1, PARTITIONS))
    reports = {1: pushed(4, 5), 2: pushed(4, 5, bits=most)}
    assert missing_for_phase_2(ONE, reports) == [
        "node node2 has more to push to node4: 1 partition waiting",
        "node node2 has more to push to node5: 1 partition waiting",
        "node node2 has more to push to node6: 1 partition waiting",
        "node node3 has not reported: 1 partition waiting",
    ]
    found = lacking(ONE, METADATA, reports)
    assert found
    assert found.partitions == (0,)
    assert found.journals == ()
    assert not lacking(ONE, METADATA, {1: pushed(4, 5), 2: pushed(4, 5)})


def test_a_member_of_both_sets_counts_itself():
    four = ClusterMap.create(bytes(16), map(member, (1, 2, 3)))
    m = four.begin(map(member, (2, 3, 4)), leaving=[1])
    assert missing_for_phase_2(m, {2: pushed(3), 3: pushed(2)}) == []
    assert missing_for_phase_2(m, {2: pushed(3), 3: pushed()})
    assert missing_for_phase_2(m, {2: pushed(3), 1: pushed(2)})
    assert missing_for_phase_2(m, {2: pushed(3), 1: pushed(2, 4)}) == []


def test_thresholds_follow_the_quorums():
    all_writes = ClusterMap.create(bytes(16), map(member, (1, 2, 3)), params=Params(3, 3, 1, 3))
    m = all_writes.begin(map(member, (4, 5, 6)), leaving=[1, 2, 3])
    # one copy has every write, but two lists are needed to know every journal
    assert missing_for_phase_2(m, {1: pushed(4, 5, 6), 2: Progress(2)}) == []
    assert missing_for_phase_2(m, {1: pushed(4, 5), 2: Progress(2)})
    assert missing_for_phase_2(m, {1: pushed(4, 5, 6)})
    assert missing_for_phase_2(m, {1: pushed(4, 5, 6), 2: Progress(2, complete=False)})
    # and one reader suffices, so all must refuse it
    two = m.advance()
    assert missing_for_stable(two, {1: Progress(3), 2: Progress(3)})
    assert missing_for_stable(two, {x: Progress(3) for x in (1, 2, 3)}) == []


def test_journals_must_have_moved():
    ready = {1: pushed(4, 5), 2: pushed(4, 5)}
    new = ONE.homes(METADATA, PARTITION)

    def found(**more):
        reports = dict(ready)
        reports[1] = Progress(2, ready[1].pushed, journal((1, 2, 3), 1))
        reports.update({int(k[1:]): v for k, v in more.items()})
        return missing_for_phase_2(ONE, reports)

    assert found() == [
        f"the journal of volume {VOLUME.hex()} (partition {PARTITION}) has 0 of 2 new homes: "
        f"waiting for {', '.join(f'node{x}' for x in new)}"
    ]
    moved = Progress(2, {}, journal((4, 5, 6), 2))
    assert "1 of 2" in found(n4=moved)[0]
    assert found(n4=moved, n6=moved) == []
    chosen = Progress(2, {}, journal((4, 5, 6), 2, held=False))
    assert found(n4=moved, n6=chosen)  # chosen is not held
    assert found(n4=moved, n6=Progress(2, {}, journal((4, 5), 2)))  # other members
    old = Progress(2, {}, journal((4, 5, 6), 1))
    assert found(n4=moved, n6=old)  # left over from an earlier config
    assert lacking(ONE, METADATA, ready | {3: pushed(), 4: chosen}).journals == (VOLUME,)


def test_a_list_of_journals_that_is_not_complete_counts_for_nothing():
    half = Progress(2, {4: ALL, 5: ALL}, (), complete=False)
    found = missing_for_phase_2(ONE, {1: pushed(4, 5), 2: half})
    assert f"node node2 has not listed all its journals: {PARTITIONS} partitions waiting" in found
    assert missing_for_phase_2(ONE, {1: pushed(4, 5), 2: half, 3: pushed()}) == []


def test_journals_of_partitions_that_stay_are_of_no_concern():
    m = ClusterMap.create(bytes(16), map(member, range(1, 9)))
    one = m.begin(map(member, range(1, 10)))
    at = next(i for i in range(100) if not one.old_homes(METADATA, _partition(i)))
    reports = {x: Progress(2, dict.fromkeys(range(1, 10), ALL)) for x in range(1, 9)}
    reports[1] = Progress(
        2, reports[1].pushed, journal((1, 2, 3), 1, volume=at.to_bytes(16, "big"))
    )
    assert missing_for_phase_2(one, reports) == []


def _partition(i):
    return partition_of(digest(i.to_bytes(16, "big")))


def test_phase_2_is_left_when_no_reader_of_a_can_have_a_quorum():
    assert missing_for_stable(TWO, {1: Progress(3), 2: Progress(3)}) == []
    assert missing_for_stable(TWO, {1: Progress(3), 2: Progress(2)}) == [
        f"node node2 is still at epoch 2: {PARTITIONS} partitions waiting",
        f"node node3 has not reported: {PARTITIONS} partitions waiting",
    ]
    late = Progress(3, {}, journal((1, 2, 3), 1))
    assert "journal" in missing_for_stable(TWO, {1: late, 2: Progress(3)})[0]


def test_an_epoch_of_the_chunk_side_asks_nobody_again():
    m = TWO.finish_chunks()
    assert m.epoch == 4
    assert missing_for_stable(m, {1: Progress(3), 2: Progress(3)}) == []


def test_chunks_are_done_when_every_new_home_has_everything():
    full = ChunkProgress(2, ALL)
    assert chunks_missing(ONE, {4: full, 5: full, 6: full}) == []
    part = ChunkProgress(2, bitmap(range(5, PARTITIONS)))
    assert chunks_missing(ONE, {4: full, 5: part, 6: ChunkProgress(1, ALL)}) == [
        f"node node6 is still at epoch 1: {PARTITIONS} partitions waiting",
        "node node5 has not got all chunks: 5 partitions waiting",
    ]
    found = lacking(ONE, CHUNK, {4: full, 5: part, 6: full})
    assert found.partitions == (0, 1, 2, 3, 4)
    # a node that was a home before needs nothing
    m = MAP.begin(map(member, (2, 3, 4)), leaving=[1])
    assert chunks_missing(m, {4: full}) == []


def test_the_wrong_phase_is_refused():
    for call, m in (
        (missing_for_phase_2, TWO),
        (missing_for_stable, ONE),
        (missing_for_phase_2, MAP),
        (chunks_missing, MAP),
        (chunks_missing, ONE.finish_chunks()),
    ):
        with pytest.raises(ConfigError):
            call(m, {})


def test_reports_cross_the_wire():
    report = Progress(7, {4: ALL, 2: NONE}, journal((1, 2, 3), 9), complete=False)
    assert Progress.from_fields(codec.unpack(codec.pack(report.fields()))) == report
    chunks = ChunkProgress(7, ALL)
    assert ChunkProgress.from_fields(codec.unpack(codec.pack(chunks.fields()))) == chunks


@pytest.mark.parametrize(
    "fields",
    [
        None,
        (),
        ("1", (), (), True),
        (1, ((2, b"short"),), (), True),
        (1, (("2", ALL),), (), True),
        (1, ((2,),), (), True),
        (1, (), ((b"v", (1,), 1),), True),
        (1, (), ((b"v", ("1",), 1, True),), True),
        (1, (), ((b"v", (1,), 1, 1),), True),
        (1, (), (), 1),
        (1, (), 5, True),
    ],
)
def test_malformed_reports_are_refused(fields):
    with pytest.raises(RemoteProtocolError):
        Progress.from_fields(fields)


@pytest.mark.parametrize("fields", [None, (1,), (1, b"short"), ("1", ALL), (1, ALL, 1)])
def test_malformed_chunk_reports_are_refused(fields):
    with pytest.raises(RemoteProtocolError):
        ChunkProgress.from_fields(fields)
