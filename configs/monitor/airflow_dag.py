"""The drift monitor as an Airflow DAG: one task an hour, whose exit code says how the deployed plan stands.

Copy it to the DAG folder. The task fails for a breach (2), an error (3) and a wrong config (64); a warning (1) and not
enough data (4) are skipped, so they show without paging anybody. Runs never overlap, and one that was missed needs no
backfill: the next one judges every window since the last.
"""

from datetime import datetime, timedelta

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

with DAG(
    dag_id="lowprec_monitor",
    schedule="15 * * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 0, "execution_timeout": timedelta(minutes=50)},
):
    BashOperator(
        task_id="monitor",
        cwd="/srv/lowprec",
        bash_command=".venv/bin/lowprec monitor monitor.yaml --plan plan.json",
        skip_on_exit_code=[1, 4],
    )
