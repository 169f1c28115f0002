//! `godwit network`: networks that machines are in.

use clap::{Args, Subcommand};
use godwit_cloud::controller::NewNetwork;
use godwit_cloud::registry::NetworkRecord;
use godwit_site::{NetworkKind, Prefix};
use godwit_types::Name;
use reqwest::Method;
use serde_json::json;

use super::people::remove;
use crate::args::{ClientArgs, Named};
use crate::client::Client;
use crate::failure::{Outcome, Result};
use crate::out::{self, Row};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List networks
    #[command(visible_alias = "ls")]
    List,
    /// Show one network
    Get {
        /// Name or id
        network: Named,
    },
    /// Make a network
    Create {
        /// Its name
        name: Name,
        /// What its machines reach: nat (the world, under an address of their site) or private (each
        /// other)
        #[arg(long, default_value_t = NetworkKind::Nat, value_name = "KIND")]
        kind: NetworkKind,
        /// Its addresses; networks may have the same
        #[arg(long, default_value_t = Prefix::DEFAULT, value_name = "PREFIX")]
        prefix: Prefix,
    },
    /// Remove a network that no machine is in
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id
        network: Named,
    },
}

impl Row for NetworkRecord {
    const COLUMNS: &'static [&'static str] = &["NAME", "KIND", "PREFIX", "AGE", "TENANT", "ID"];
    const WIDE: usize = 4;
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            self.kind.to_string(),
            self.prefix.to_string(),
            out::age(self.created),
            self.tenant.to_string(),
            self.id.to_string(),
        ]
    }
    fn name(&self) -> String {
        self.name.to_string()
    }
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let format = self.client_args.output;
        match self.verb {
            Verb::List => {
                let all: Vec<NetworkRecord> = client.get("/v1/networks").await?;
                out::list(format, &all)?;
            }
            Verb::Get { network } => {
                let path = format!("/v1/networks/{}", network.path());
                let one: NetworkRecord = client.get(&path).await?;
                out::one(format, &one)?;
            }
            Verb::Create { name, kind, prefix } => {
                let new = NewNetwork { name, kind: Some(kind), prefix: Some(prefix) };
                let made: NetworkRecord =
                    client.ask(Method::POST, "/v1/networks", Some(&new)).await?;
                let words = format!("{}   made, {} with {}", made.name, made.kind, made.prefix);
                out::action(format, &words, made.name.as_str(), &json!(made))?;
            }
            Verb::Delete { network } => {
                let path = format!("/v1/networks/{}", network.path());
                return remove(&self.client_args, &client, &path, network.as_str()).await;
            }
        }
        Ok(Outcome::Done)
    }
}
