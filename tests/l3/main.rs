//! L3, whole: the real agents and the real controller in the three-pool lab.
//!
//! The proofs are shared with the demo (`raven_tests::proof`); each test here is a story in which they must hold.

#![forbid(unsafe_code)]

mod forged;
mod gateway_moves;
mod goes_on;
mod live_change;
mod neighbours;
mod node_addresses;
mod nothing_is_left;
mod outages;
mod path;
mod preshared;
mod scale;
mod services;
mod surroundings;
mod three_pools;
mod upgrade;

use anyhow::{Context, Result};
use raven_tests::{Lab, LabBuilder, agent::Agent, process::Process, proof};

/// A lab in which everything runs and every pair of pools talks.
struct Running {
    agents: Vec<Agent>,
    _controller: Process,
    lab: Lab,
}

impl Running {
    async fn start() -> Result<Self> {
        Self::of(Lab::builder()).await
    }

    async fn of(builder: LabBuilder) -> Result<Self> {
        let running = Self::begin(builder.up().await?).await?;
        running.check(proof::converged(&running.lab).await.map(drop));
        Ok(running)
    }

    /// The same without waiting for anything.
    async fn begin(lab: Lab) -> Result<Self> {
        lab.cluster().apply_gateways(lab.site()).await?;
        let controller = lab.start_controller().await?;
        let agents = lab.start_agents().await?;
        Ok(Self { agents, _controller: controller, lab })
    }

    fn agent(&mut self, node: &str) -> &mut Agent {
        self.agents.iter_mut().find(|a| a.node.name == node).expect("every node has an agent")
    }

    /// Fails the test with what was seen, after saving what there is to look at.
    fn check<T>(&self, result: Result<T>) -> T {
        result.unwrap_or_else(|error| {
            let test = std::thread::current().name().unwrap_or("l3").to_owned();
            match self.lab.save_failure(&test).context("save what there is to look at") {
                Ok(folder) => eprintln!("saved in {}", folder.display()),
                Err(e) => eprintln!("{e:#}"),
            }
            panic!("{error:#}")
        })
    }
}
