"""Gives MLflow's admin the password of the environment: MLflow reads it at its first start only."""

import os

from mlflow.server.auth.config import read_auth_config
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

store = SqlAlchemyStore()
store.init_db(read_auth_config().database_uri)
store.update_user(
    os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], password=os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
)
