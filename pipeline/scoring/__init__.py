"""Token ids to log-probabilities: model loading, batch layouts, the chunked head. Shared by both stages."""
