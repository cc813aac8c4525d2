"""Where rows come from: users' files and hubs, embedded real corpora, simulators, generators."""
