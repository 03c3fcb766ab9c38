"""What jobs that publish a release have in common."""

from deploylib.plan import Plan
from upq_jobs.tables import published, put, release, tables

from upq import UpqJob

TOTAL = 6


class Publisher(UpqJob):
    """A job whose number is that of the release it publishes."""

    app: str

    def publish(self, zoombuild, bundle, database):
        """Start the bundle on a server, run its hooks, show it to visitors; returns where it is."""
        plan = Plan.parse(zoombuild)
        common = {"app": self.app, "release": self.jobid}

        self.progress(2, TOTAL, "placement")
        server = self.submit("placement", app=self.app).wait()["server"]
        here = {**common, "server": server}

        self.progress(3, TOTAL, f"deploy on appserver {server}")
        site = self.submit(
            "deploy", here, queue=f"appserver_{server}",
            sha256=bundle["sha256"], zoombuild=zoombuild, password=database["password"],
            database={name: database[name] for name in ("name", "host", "port", "user")},
        ).wait()  # fmt: skip
        for hook in plan.hooks:
            self.progress(4, TOTAL, hook)
            self.submit("manage", here, queue=f"appserver_{server}", hook=hook).wait()

        self.progress(5, TOTAL, "proxy")
        address = {name: site[name] for name in ("address", "port")}
        hosts = " ".join(plan.hosts)
        shown = self.submit("proxy_update", common, hosts=hosts, **address).wait()

        kept = {"server": server, "commit": bundle["commit"], "sha256": bundle["sha256"]}
        servers = self.step("record", self.record, {**kept, **address, "zoombuild": zoombuild})
        self.gather([
            self.submit("retire", common, server=one, queue=f"appserver_{one}") for one in servers
        ])  # fmt: skip
        self.progress(TOTAL, TOTAL, "published")
        self.msg(f"{self.app} is at {shown['url']}, release {self.jobid}")
        return {"url": shown["url"], "release": self.jobid, **site}

    def record(self, row):
        """Note the release; returns the servers that have one of this application."""
        with tables(self.db) as db:
            put(db, release, release=self.jobid, app=self.app, **row)
            return sorted({known["server"] for known in published(db, self.app)})
