"""The registry of an NTS pool: accounts, servers, certificates, DNS, probes; console script `poolsvc`."""
