"""Ranks of a job meet in a directory that is removed when the last of them has ended."""

from megatron_s2d.workflow.process_pool import RankProcess, _Scratch


class EndedProcess:
    exitcode = 0

    def join(self):
        pass


def test_the_directory_of_a_job_is_removed_with_its_last_rank(tmp_path):
    scratch = _Scratch(2)
    folder = scratch.rendezvous.parent
    scratch.rendezvous.write_text("store")
    ranks = [RankProcess(EndedProcess(), None, tmp_path / "heartbeat", scratch) for _ in range(2)]
    ranks[0].join()
    assert scratch.rendezvous.exists()
    ranks[1].join()
    assert not folder.exists()
