from upq_jobs.container import Container


class Keep(Container):
    """keep cid:501: the same, but it keeps running."""
