"""Backstop runs chat jobs that must not fail. Read it in the order a job meets it:

submit -> dispatch -> tasks -> attempt {ledger.claim -> route -> chain -> settlement -> ledger.settle}, and `keeper` mends what dies.

Beside that spine: `config` (what) and `settings` (where), `tables` (the truth), `signals` (what an error means), `cost` (money);
`providers/` speaks to vendors, `resilience/` guards them, `embedded/` brings Postgres and Valkey along, `simulator/` plays the vendors.
"""

__version__ = "0.1.0"
