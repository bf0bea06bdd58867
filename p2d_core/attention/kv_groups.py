"""Which KV group a query head reads."""


def kv_group_of(query_head: int, n_query_heads: int, n_kv_groups: int) -> int:
    """KV group read by one query head (GQA); all indices from 0."""
    return query_head // (n_query_heads // n_kv_groups)
