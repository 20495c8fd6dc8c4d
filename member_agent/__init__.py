"""The member's side: `pool-agent` makes a host a server of an NTS pool and keeps it one."""
