-- What upq made of an empty database in version 1 of its tables, and three jobs.

CREATE TABLE upq_counter (
    name VARCHAR(16) NOT NULL,
    n BIGINT NOT NULL,
    PRIMARY KEY (name)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE TABLE upq_edge (
    job BIGINT NOT NULL,
    needs BIGINT NOT NULL,
    PRIMARY KEY (job, needs)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE INDEX upq_edge_needs ON upq_edge (needs);

CREATE TABLE upq_event (
    n BIGINT NOT NULL,
    job BIGINT NOT NULL,
    lane BIGINT NOT NULL,
    at BIGINT NOT NULL,
    state VARCHAR(10) NOT NULL,
    reason VARCHAR(255) NOT NULL,
    message TEXT,
    attempt INTEGER NOT NULL,
    node VARCHAR(255) NOT NULL,
    who VARCHAR(255) NOT NULL,
    PRIMARY KEY (n)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE INDEX upq_event_job ON upq_event (job, n);

CREATE TABLE upq_job (
    id BIGINT NOT NULL,
    lane BIGINT NOT NULL,
    type VARCHAR(64) NOT NULL,
    queue VARCHAR(255) NOT NULL,
    ready BIGINT,
    `rank` INTEGER NOT NULL,
    ord BIGINT NOT NULL,
    state VARCHAR(10) NOT NULL,
    reason VARCHAR(255) NOT NULL,
    params LONGTEXT NOT NULL,
    data LONGTEXT,
    options LONGTEXT,
    run_at BIGINT,
    due_at BIGINT,
    expires_at BIGINT,
    attempt INTEGER NOT NULL,
    starts INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    token BIGINT NOT NULL,
    owner VARCHAR(32),
    lease_until BIGINT,
    cancel_asked SMALLINT NOT NULL,
    idem_key VARCHAR(64),
    waits INTEGER NOT NULL,
    parent BIGINT,
    root BIGINT NOT NULL,
    child_key VARCHAR(64),
    submitter VARCHAR(255) NOT NULL,
    result LONGTEXT,
    message LONGTEXT,
    progress TEXT,
    created_at BIGINT NOT NULL,
    started_at BIGINT,
    ended_at BIGINT,
    PRIMARY KEY (id)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE UNIQUE INDEX upq_job_child_key ON upq_job (child_key);

CREATE INDEX upq_job_due ON upq_job (due_at);

CREATE UNIQUE INDEX upq_job_idem_key ON upq_job (idem_key);

CREATE INDEX upq_job_parent ON upq_job (parent);

CREATE INDEX upq_job_ready ON upq_job (ready, `rank`, ord, id);

CREATE INDEX upq_job_state ON upq_job (state, ended_at, id);

CREATE INDEX upq_job_type ON upq_job (type, id);

CREATE TABLE upq_lane (
    id BIGINT NOT NULL AUTO_INCREMENT,
    queue VARCHAR(255) NOT NULL,
    type VARCHAR(64) NOT NULL,
    node VARCHAR(255) NOT NULL,
    paused SMALLINT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT upq_lane_name UNIQUE (queue, type, node)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE TABLE upq_node (
    id VARCHAR(32) NOT NULL,
    name VARCHAR(255) NOT NULL,
    machine VARCHAR(64) NOT NULL,
    pid INTEGER NOT NULL,
    started_at BIGINT NOT NULL,
    beat_at BIGINT NOT NULL,
    PRIMARY KEY (id)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE TABLE upq_output (
    job BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    text LONGTEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    truncated SMALLINT NOT NULL,
    PRIMARY KEY (job, attempt)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE TABLE upq_tally (
    lane BIGINT NOT NULL,
    state VARCHAR(10) NOT NULL,
    n BIGINT NOT NULL,
    PRIMARY KEY (lane, state)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

CREATE TABLE upq_version (
    version INTEGER NOT NULL,
    PRIMARY KEY (version)
)ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_nopad_bin;

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
