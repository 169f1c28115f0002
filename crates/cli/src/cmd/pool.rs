//! `godwit pool`: what the sites' stores hold.

use clap::{Args, Subcommand};
use godwit_cloud::controller::Unanswered;
use godwit_site::PoolReport;
use godwit_types::Name;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::{Change, ClientArgs};
use crate::client::Client;
use crate::failure::{Outcome, Result};
use crate::out::{self, Format, Row, size};
use crate::wait::{Changed, change, parts};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show what each site's pool holds
    Status,
    /// Read every page and block and compare it with its hash
    Check {
        /// Only this site; all that are ready when left out
        #[arg(long)]
        site: Option<Name>,
        #[command(flatten)]
        how: CheckHow,
    },
}

#[derive(Debug, Args)]
struct CheckHow {
    /// Print the operation's id at once instead of waiting for its end
    #[arg(long)]
    no_wait: bool,
    /// Wait no longer for each site (exit code 124; the check goes on)
    #[arg(long, value_parser = crate::args::duration, value_name = "TIME")]
    timeout: Option<std::time::Duration>,
}

/// A site's pool.
#[derive(Debug, Serialize, Deserialize)]
struct SitePool {
    site: Name,
    #[serde(flatten)]
    pool: PoolReport,
}

/// What the center answers.
#[derive(Debug, Deserialize)]
struct Listed {
    pools: Vec<SitePool>,
    unanswered: Vec<Unanswered>,
}

impl Row for SitePool {
    const COLUMNS: &'static [&'static str] =
        &["SITE", "SUBSTRATES", "UNITS", "RAW", "STORED", "SAVED", "FREE", "WAITING", "IN-MEMORY"];
    const WIDE: usize = 8;
    fn cells(&self) -> Vec<String> {
        let p = &self.pool;
        let saved = if p.raw_bytes == 0 {
            String::new()
        } else {
            let part = 100.0 * (1.0 - p.stored_bytes as f64 / p.raw_bytes as f64);
            format!("{:.0} %", part.max(0.0))
        };
        vec![
            self.site.to_string(),
            p.substrates.to_string(),
            p.units.to_string(),
            size(p.raw_bytes),
            size(p.stored_bytes),
            saved,
            size(p.free_bytes),
            p.waiting.to_string(),
            size(p.memory_bytes),
        ]
    }
    fn name(&self) -> String {
        self.site.to_string()
    }
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let listed: Listed = client.get("/v1/pool").await?;
        let all = listed.pools;
        out::unanswered(&listed.unanswered);
        match self.verb {
            Verb::Status => out::list(self.client_args.output, &all)?,
            Verb::Check { site, how } => {
                let one = site.is_some();
                let sites = match site {
                    Some(s) => vec![s],
                    None => all.into_iter().map(|p| p.site).collect(),
                };
                let how = Change { dry_run: false, no_wait: how.no_wait, timeout: how.timeout };
                let (mut found, mut bad) = (Vec::new(), None);
                for site in sites {
                    let path = format!("/v1/pool/{site}/check");
                    match change(&client, &self.client_args, &how, Method::POST, &path, &json!({}))
                        .await
                    {
                        Ok(Changed::Done { op, .. }) => {
                            let (op, result) = parts(op);
                            let check = result.map(|r| r["check"].clone()).unwrap_or_default();
                            found.push(json!({ "op": op, "check": check, "site": site }));
                        }
                        Ok(Changed::Reported) => {}
                        // The other sites are looked at all the same.
                        Err(e) => bad = bad.or(Some(e)),
                    }
                }
                checked(self.client_args.output, &found, one)?;
                return bad.map_or(Ok(Outcome::Done), Err);
            }
        }
        Ok(Outcome::Done)
    }
}

/// Prints what was checked: a line for each site, or all as one text; `one` was asked for by name.
fn checked(format: Format, found: &[Value], one: bool) -> Result<()> {
    match (format, found) {
        (_, []) => Ok(()),
        (Format::Json | Format::Yaml, [site]) if one => out::value(format, site),
        (Format::Json | Format::Yaml, all) => out::value(format, all),
        (_, all) => all.iter().try_for_each(|site| {
            let name = site["site"].as_str().unwrap_or_default();
            let units = site["check"]["units"].as_u64().unwrap_or(0);
            let words = format!("{name}   {units} units read, all as their hashes say");
            out::action(format, &words, name, site)
        }),
    }
}
