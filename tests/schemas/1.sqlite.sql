-- What upq made of an empty database in version 1 of its tables, and three jobs.

CREATE TABLE upq_counter (
    name VARCHAR(16) NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE upq_edge (
    job INTEGER NOT NULL,
    needs INTEGER NOT NULL,
    PRIMARY KEY (job, needs)
);

CREATE INDEX upq_edge_needs ON upq_edge (needs);

CREATE TABLE upq_event (
    n INTEGER NOT NULL,
    job INTEGER NOT NULL,
    lane INTEGER NOT NULL,
    at INTEGER NOT NULL,
    state VARCHAR(10) NOT NULL,
    reason VARCHAR(255) NOT NULL,
    message TEXT,
    attempt INTEGER NOT NULL,
    node VARCHAR(255) NOT NULL,
    who VARCHAR(255) NOT NULL,
    PRIMARY KEY (n)
);

CREATE INDEX upq_event_job ON upq_event (job, n);

CREATE TABLE upq_job (
    id INTEGER NOT NULL,
    lane INTEGER NOT NULL,
    type VARCHAR(64) NOT NULL,
    queue VARCHAR(255) NOT NULL,
    ready INTEGER,
    rank INTEGER NOT NULL,
    ord INTEGER NOT NULL,
    state VARCHAR(10) NOT NULL,
    reason VARCHAR(255) NOT NULL,
    params TEXT NOT NULL,
    data TEXT,
    options TEXT,
    run_at INTEGER,
    due_at INTEGER,
    expires_at INTEGER,
    attempt INTEGER NOT NULL,
    starts INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    token INTEGER NOT NULL,
    owner VARCHAR(32),
    lease_until INTEGER,
    cancel_asked SMALLINT NOT NULL,
    idem_key VARCHAR(64),
    waits INTEGER NOT NULL,
    parent INTEGER,
    root INTEGER NOT NULL,
    child_key VARCHAR(64),
    submitter VARCHAR(255) NOT NULL,
    result TEXT,
    message TEXT,
    progress TEXT,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    ended_at INTEGER,
    PRIMARY KEY (id)
);

CREATE UNIQUE INDEX upq_job_child_key ON upq_job (child_key);

CREATE INDEX upq_job_due ON upq_job (due_at) WHERE due_at IS NOT NULL;

CREATE UNIQUE INDEX upq_job_idem_key ON upq_job (idem_key);

CREATE INDEX upq_job_parent ON upq_job (parent) WHERE parent IS NOT NULL;

CREATE INDEX upq_job_ready ON upq_job (ready, rank, ord, id) WHERE ready IS NOT NULL;

CREATE INDEX upq_job_state ON upq_job (state, ended_at, id);

CREATE INDEX upq_job_type ON upq_job (type, id);

CREATE TABLE upq_lane (
    id INTEGER NOT NULL,
    queue VARCHAR(255) NOT NULL,
    type VARCHAR(64) NOT NULL,
    node VARCHAR(255) NOT NULL,
    paused SMALLINT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT upq_lane_name UNIQUE (queue, type, node)
);

CREATE TABLE upq_node (
    id VARCHAR(32) NOT NULL,
    name VARCHAR(255) NOT NULL,
    machine VARCHAR(64) NOT NULL,
    pid INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    beat_at INTEGER NOT NULL,
    PRIMARY KEY (id)
);

CREATE TABLE upq_output (
    job INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    text TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    truncated SMALLINT NOT NULL,
    PRIMARY KEY (job, attempt)
);

CREATE TABLE upq_tally (
    lane INTEGER NOT NULL,
    state VARCHAR(10) NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (lane, state)
);

CREATE TABLE upq_version (
    version INTEGER NOT NULL,
    PRIMARY KEY (version)
);

INSERT INTO upq_counter VALUES('job',3);
INSERT INTO upq_counter VALUES('event',3);
INSERT INTO upq_event VALUES(1,1,1,1795320792948568,'queued','',NULL,0,'node','');
INSERT INTO upq_event VALUES(2,2,1,1795320792951011,'queued','',NULL,0,'node','');
INSERT INTO upq_event VALUES(3,3,1,1795320792951520,'queued','',NULL,0,'node','');
INSERT INTO upq_job VALUES(1,1,'hash','hash',1,0,1,'queued','','{"n":0}',NULL,NULL,NULL,NULL,NULL,0,0,0,0,NULL,NULL,0,NULL,0,NULL,1,NULL,'',NULL,NULL,NULL,1795320792946218,NULL,NULL);
INSERT INTO upq_job VALUES(2,1,'hash','hash',1,0,2,'queued','','{"n":1}',NULL,NULL,NULL,NULL,NULL,0,0,0,0,NULL,NULL,0,NULL,0,NULL,2,NULL,'',NULL,NULL,NULL,1795320792950969,NULL,NULL);
INSERT INTO upq_job VALUES(3,1,'hash','hash',1,0,3,'queued','','{"n":2}',NULL,NULL,NULL,NULL,NULL,0,0,0,0,NULL,NULL,0,NULL,0,NULL,3,NULL,'',NULL,NULL,NULL,1795320792951490,NULL,NULL);
INSERT INTO upq_lane VALUES(1,'hash','hash','',0);
INSERT INTO upq_tally VALUES(1,'queued',3);
INSERT INTO upq_tally VALUES(1,'blocked',0);
INSERT INTO upq_tally VALUES(1,'running',0);
INSERT INTO upq_tally VALUES(1,'done',0);
INSERT INTO upq_tally VALUES(1,'failed',0);
INSERT INTO upq_tally VALUES(1,'cancelled',0);
INSERT INTO upq_tally VALUES(1,'expired',0);
INSERT INTO upq_version VALUES(1);
