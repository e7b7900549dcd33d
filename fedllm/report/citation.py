"""How to cite a report: the software, and the survey that maps the field."""

from __future__ import annotations

SURVEY = """@article{yao2024federated,
  title   = {Federated Large Language Models: Current Progress and Future Directions},
  author  = {Yao, Yuhang and Zhang, Jianyi and Wu, Junda and Huang, Chengkai and Xia, Yu and Yu, Tong and
             Zhang, Ruiyi and Kim, Sungchul and Rossi, Ryan and Li, Ang and Yao, Lina and McAuley, Julian and
             Chen, Yiran and Joe-Wong, Carlee},
  journal = {arXiv preprint arXiv:2409.15723},
  year    = {2024}
}"""


def bibtex(version: str | None) -> str:
    """Both entries. `version` is that of the fedllm that ran, if it is known."""
    lines = ["  author  = {{The fedllm authors}},", "  title   = {fedllm},"]
    if version:
        lines.append(f"  version = {{{version}}},")
    lines.append("  note    = {Licence: Apache-2.0}")
    return "\n".join(["@software{fedllm,", *lines, "}", "", SURVEY])
