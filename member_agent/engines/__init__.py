"""What answers NTS-KE and NTP on the member's host; `builtin` is the one inside the agent."""
