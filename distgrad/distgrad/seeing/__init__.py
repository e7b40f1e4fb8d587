"""Looking on at a running broker: a history made by polling, and what shows it (terminal, browser, Prometheus)."""
