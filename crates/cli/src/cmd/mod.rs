//! The commands, one module a noun.

pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod image;
pub(crate) mod network;
pub(crate) mod op;
pub(crate) mod people;
pub(crate) mod pool;
pub(crate) mod role;
pub(crate) mod sched;
mod screen;
pub(crate) mod share;
pub(crate) mod shell;
pub(crate) mod site;
pub(crate) mod substrate;
pub(crate) mod up;
pub(crate) mod vm;

use crate::args::{Cli, Command};
use crate::failure::Result;

/// Runs the command.
pub(crate) async fn run(cli: Cli) -> Result {
    match cli.command {
        Command::Up(c) => c.run().await,
        Command::Down(c) => c.run().await,
        Command::Vm(c) => c.run().await,
        Command::Substrate(c) => c.run().await,
        Command::Image(c) => c.run().await,
        Command::Site(c) => c.run().await,
        Command::Op(c) => c.run().await,
        Command::Network(c) => c.run().await,
        Command::Tenant(c) => c.run().await,
        Command::User(c) => c.run().await,
        Command::Token(c) => c.run().await,
        Command::Pool(c) => c.run().await,
        Command::Sched(c) => c.run().await,
        Command::Grant(c) => c.run().await,
        Command::Quota(c) => c.run().await,
        Command::Audit(c) => c.run().await,
        Command::Doctor(c) => c.run().await,
        Command::Center(c) => c.run().await,
        Command::Ap(c) => c.run().await,
        Command::Relay(c) => c.run().await,
        Command::Completion(c) => c.run(),
        Command::Man(c) => c.run(),
    }
}
