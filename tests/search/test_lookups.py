"""Lookups of which the first order is not known are named by the dry run, the search and the monitor."""

import pytest
from own_model import own_job, uniform_plan

from lowprec.core.errors import ModelError
from lowprec.gate import verify_plan
from lowprec.monitor import run_monitor
from lowprec.search import open_job, run_search
from lowprec.search.record.describe import describe_job

TEMPLATE = """
class M(Base):
    def forward(self, dense, sparse):
        ids, ends = sparse["history"]
        n = len(dense)
        rows = torch.repeat_interleave(torch.arange(n), ends.diff())
        user, item, hist = self.user(*sparse["user"]), self.item(*sparse["item"]), None
        {lookup}
        return self.top(torch.cat([dense, user, item, hist], 1)).squeeze(1)


def build():
    return M()
"""
BY_NUMBER = {
    "joint": "both = torch.stack([sparse['item'][0], sparse['user'][0]], 1); "
    "hist = self.hist(both.reshape(-1, 1)).reshape(n, 2, -1).sum(1)",
    "jagged": "hist = torch.zeros(n, 8).index_add(0, rows, self.hist(ids, torch.arange(len(ids) + 1)))",
    "unique": "u, back = ids.unique(return_inverse=True); "
    "hist = torch.zeros(n, 8).index_add(0, rows, self.hist(u.unsqueeze(1))[back])",
    "one for all": "hist = self.hist(torch.zeros(1, 1, dtype=torch.long)).expand(n, -1)",
}
BY_MEASURE = {
    "sorted": (
        "order = sparse['item'][0].argsort(); x = self.hist(sparse['item'][0][order].unsqueeze(1)); "
        "hist = torch.zeros_like(x).index_copy(0, order, x)",
        "reorders the rows",
    ),
    "no_grad": ("\n        with torch.no_grad(): hist = self.hist(ids, ends)", "no gradient reaches it"),
}


@pytest.mark.parametrize(
    ("lookup", "said"),
    [(code, r"was looked up with [\d,]+ bags? for a batch of 250 examples") for code in BY_NUMBER.values()]
    + list(BY_MEASURE.values()),
    ids=[*BY_NUMBER, *BY_MEASURE],
)
def test_a_lookup_without_a_first_order_is_named(lookup, said, tmp_path):
    config = own_job(tmp_path, TEMPLATE.format(lookup=lookup))
    plan = uniform_plan(config, tmp_path)
    for command in (lambda: describe_job(open_job(config)), lambda: run_search(config)):
        with pytest.raises(ModelError, match=f'table "hist".*{said}|table "hist" {said}'):
            command()
    monitored = run_monitor(config, plan)
    assert monitored.state == "error" and '"hist"' in monitored.message
    verify_plan(config, plan)  # exact evaluation needs no first order
    fixed = own_job(
        tmp_path, TEMPLATE.format(lookup=lookup), space={"units": [{"match": "table:hist", "fixed": "fp32"}]}
    )
    describe_job(open_job(fixed))
    run_search(fixed)
