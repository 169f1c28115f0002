//! What every suite needs: statistics, results with all raw values, plots and a report.

pub mod figures;
mod machine;
mod plot;
mod report;
mod results;
pub mod stats;

pub use machine::{MachineInfo, git_revision};
pub use report::{WriteError, write};
pub use results::{
    Better, Comparison, Experiment, LinkInfo, Picture, Results, SCHEMA, Series, Table,
};
