"""Real Postgres and real Valkey from Python wheels, started when first used and stopped when last used.

Read `servers` (what the rest of Backstop calls), then `minder` (the small process that keeps one server alive), then
`postgres` and `valkey` (how each is started). Each server has a home under the data directory:

    data/            the server's own files
    url              where it answers, password included; there while it does
    password         made once
    VERSION          generation of the server that wrote `data/`
    log, log.1       what it said this time and the time before
    door.lock        held by one process while it joins: it finds the server, or starts it
    users.lock       shared by all processes that use the server; free for the minder means that nobody does
    minder.lock      held by the minder
    server.lock      inherited by the server and all its children: held means that something still writes to `data/`

All four are `flock`s, so the kernel lets go of them however a process ends. The process id that the last two hold is
believed only while the lock is held.
"""
