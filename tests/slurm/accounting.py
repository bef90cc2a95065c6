"""The cluster of ``cluster.py`` with accounting: slurmdbd, and a MariaDB of its own on a socket in the folder. Needs slurmdbd,
slurm-wlm-mysql-plugin and mariadb-server besides."""

from __future__ import annotations

import shutil
import subprocess

from tests.slurm.cluster import SEARCH, CannotStart, Cluster

PACKAGES = "slurmdbd slurm-wlm-mysql-plugin mariadb-server"
CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={munge}
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/linux
"""
DBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost=localhost
DbdPort={port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounts
"""


class AccountingCluster(Cluster):
    """It keeps jobs' comments, which most sites do not ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.database = self.folder / "mysql"
        self._port = 0
        self.env["MYSQL_UNIX_PORT"] = str(self.database / "mysql.sock")

    def up(self) -> None:
        missing = [name for name in ("slurmdbd", "mariadbd", "mariadb-install-db") if shutil.which(name, path=SEARCH) is None]
        if missing:
            raise CannotStart(f"{', '.join(missing)} not installed: apt-get install --no-install-recommends {PACKAGES}")
        super().up()

    def _accounting(self, port: int) -> str:
        self._port = port
        return CONF.format(port=port, munge=self.folder / "munge.sock")

    def _before_controller(self) -> None:
        self.database.mkdir()
        shutil.chown(self.database, "mysql", "mysql")
        options = ["--no-defaults", "--user=mysql", f"--datadir={self.database}"]
        install = ["mariadb-install-db", *options, "--auth-root-authentication-method=socket", "--skip-test-db"]
        subprocess.run(install, env=self.env, check=True, capture_output=True, timeout=120)
        self._start(["mariadbd", *options, f"--socket={self.database}/mysql.sock", "--skip-networking", "--innodb-buffer-pool-size=16M"])
        make = ["mariadb", "--no-defaults", f"--socket={self.database}/mysql.sock", "-e", "create database accounts"]
        self._until(lambda: self.run(*make) == "", "MariaDB")
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(DBD_CONF.format(folder=self.folder, munge=self.folder / "munge.sock", port=self._port))
        conf.chmod(0o600)
        self._start(["slurmdbd", "-D"])
        self._until(lambda: self.run("sacctmgr", "-n", "show", "cluster") == "", "slurmdbd")
        self.run("sacctmgr", "-n", "-i", "add", "cluster", "longstride")
