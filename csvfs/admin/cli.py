"""The command `csvfs`: nouns, then verbs. `csvfs COMMAND --help` explains each.

Place      admin floor; the top of the house. Each noun has a module cli_<noun>.py.
"""

import click

from csvfs.admin.cli_cluster import cluster_group
from csvfs.admin.cli_context import OneLineErrors
from csvfs.admin.cli_domain import domain_group
from csvfs.admin.cli_drill import drill_command
from csvfs.admin.cli_drive import drive_group
from csvfs.admin.cli_file import file_group
from csvfs.admin.cli_file_integrity import integrity_command  # noqa: F401 adds itself
from csvfs.admin.cli_job import job_group
from csvfs.admin.cli_lab import lab_group
from csvfs.admin.cli_node import node_group
from csvfs.admin.cli_pool import pool_group
from csvfs.admin.cli_quota import quota_group
from csvfs.admin.cli_status import status_command
from csvfs.admin.cli_volume import volume_group
from csvfs.admin.cli_volume_check import check_command  # noqa: F401 adds itself
from csvfs.admin.cli_why import why_command


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="csvfs", prog_name="csvfs")
def main() -> None:
    """A clustered file system for virtual-machine images.

    The node is configured by /etc/csvfs/node.toml, or the file that $CSVFS_CONFIG names.
    """


for command in (
    status_command,
    cluster_group,
    node_group,
    drive_group,
    domain_group,
    pool_group,
    volume_group,
    quota_group,
    file_group,
    why_command,
    job_group,
    lab_group,
    drill_command,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
