//! `godwit op`: long jobs.

use std::time::Duration;

use clap::{Args, Subcommand};
use godwit_cloud::registry::{EventKind, OpRecord};
use godwit_types::OpId;
use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use crate::args::{ClientArgs, duration, op_id};
use crate::client::{Client, EMPTY};
use crate::failure::{Outcome, Result};
use crate::out::{self, Row, millis};
use crate::wait::follow;
use crate::watch::{Watch, Watched, watch};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List operations, oldest first
    #[command(visible_alias = "ls")]
    List {
        /// Only those that have not ended
        #[arg(long)]
        running: bool,
        /// Keep the list up to date
        #[arg(short, long)]
        watch: bool,
    },
    /// Wait for an operation's end; fails as the operation did
    Wait {
        /// Its id
        #[arg(value_parser = op_id)]
        op: OpId,
        /// Wait no longer, e.g. 90, 500ms, 5m (exit code 124)
        #[arg(long, value_parser = duration, value_name = "TIME")]
        timeout: Option<Duration>,
    },
    /// Ask an operation to stop and to undo what it did
    Cancel {
        /// Its id
        #[arg(value_parser = op_id)]
        op: OpId,
    },
}

impl Row for OpRecord {
    const COLUMNS: &'static [&'static str] =
        &["ID", "DOES", "TARGET", "STATE", "AGE", "TOOK", "ERROR"];
    const WIDE: usize = 5;
    fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.kind.verb().into(),
            self.kind.target().to_string(),
            self.state.to_string(),
            out::age(self.started),
            self.ended
                .map(|e| millis(e.since(self.started).as_secs_f64() * 1e3))
                .unwrap_or_default(),
            self.error.as_ref().map(|e| e.message.clone()).unwrap_or_default(),
        ]
    }
    fn name(&self) -> String {
        self.id.to_string()
    }
}

impl Watch for OpRecord {
    const KIND: EventKind = EventKind::Op;
    type Record = Self;
    fn of(record: Self) -> Self {
        record
    }
    fn key(&self) -> String {
        self.id.to_string()
    }
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let format = self.client_args.output;
        match self.verb {
            Verb::List { running, watch: true } => {
                let keep = Box::new(move |o: &OpRecord| !running || !o.state.is_final());
                let what = Watched { list: "/v1/ops", only: None, keep };
                return watch(&self.client_args, what).await;
            }
            Verb::List { running, watch: false } => {
                let mut all: Vec<OpRecord> = client.get("/v1/ops").await?;
                all.retain(|o| !running || !o.state.is_final());
                out::list(format, &all)?;
            }
            Verb::Wait { op, timeout } => {
                out::one(format, &follow(&client, op, timeout.map(|t| Instant::now() + t)).await?)?;
            }
            Verb::Cancel { op } => {
                let path = format!("/v1/ops/{op}/cancel");
                let (): () = client.ask(Method::POST, &path, EMPTY).await?;
                let data = json!({ "op": op, "asked": "cancel" });
                let words = format!("{op}   asked to stop");
                out::action(format, &words, &op.to_string(), &data)?;
            }
        }
        Ok(Outcome::Done)
    }
}
