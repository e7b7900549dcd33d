"""Secure aggregation: a server adds up the vectors of its clients and learns the sum and nothing else.

The protocol is SecAgg+ (Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
IACR ePrint 2020/704) with the consistency round of Bonawitz et al. 2017 ("Practical Secure Aggregation for
Privacy-Preserving Machine Learning", IACR ePrint 2017/281), pinned identities and the hash of the model in every key.

    stage        client (client.py)                         server (server.py)
    1 advertise  advertise(manifest, ...) -> frame          add_advertisement(frame), bundle()
    2 share      share(bundle) -> frame                     add_shares(frame), inboxes()
    3 mask       mask(inbox, vector) -> frame               add_masked(frame), survivors()
    4 agree      agree(survivors) -> frame                  add_consent(frame), consents()
    5 unmask     unmask(consents) -> frame                  add_unmasking(frame)
    6 finish                                                finish() -> sum

All messages are bytes. What a client or a server remembers between two of them is a plain value.
"""
