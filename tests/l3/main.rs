//! L3 tests with the real agents and the real controller in the three-pool lab.
//!
//! The checks are shared with the demo (`raven_tests::proof`); each test verifies them in one scenario.

#![forbid(unsafe_code)]

mod degraded;
mod encryption;
mod engine;
mod environment;
mod fail_closed;
mod flannel;
mod forged;
mod gateway_failover;
mod host_names;
mod ipv6_only;
mod live_changes;
mod neighbours;
mod network_policy;
mod node_addresses;
mod node_state;
mod other_programs;
mod outages;
mod path;
mod preshared;
mod scale;
mod services;
mod three_pools;
mod upgrade;
mod uplinks;
mod upstream_gateways;

use anyhow::{Context, Result};
use raven_tests::{Lab, LabBuilder, agent::Agent, process::Process, proof};

/// A lab with a running controller and agents.
struct Running {
    agents: Vec<Agent>,
    _controller: Process,
    lab: Lab,
}

impl Running {
    /// Starts the default lab and waits until all pools are connected.
    async fn start() -> Result<Self> {
        Self::of(Lab::builder()).await
    }

    /// Starts a lab and waits until all pools are connected.
    async fn of(builder: LabBuilder) -> Result<Self> {
        let running = Self::begin(builder.up().await?).await?;
        running.check(proof::converged(&running.lab).await.map(drop));
        Ok(running)
    }

    /// Starts controller and agents in a lab, without waiting.
    async fn begin(lab: Lab) -> Result<Self> {
        lab.cluster().apply_gateways(lab.site()).await?;
        let controller = lab.start_controller().await?;
        let agents = lab.start_agents().await?;
        Ok(Self { agents, _controller: controller, lab })
    }

    fn agent(&mut self, node: &str) -> &mut Agent {
        self.agents.iter_mut().find(|a| a.node.name == node).expect("the node has an agent")
    }

    /// Returns the value, or saves evidence and fails the test with the error.
    fn check<T>(&self, result: Result<T>) -> T {
        result.unwrap_or_else(|error| {
            let test = std::thread::current().name().unwrap_or("l3").to_owned();
            match self.lab.save_failure(&test).context("save evidence") {
                Ok(folder) => eprintln!("evidence: {}", folder.display()),
                Err(e) => eprintln!("{e:#}"),
            }
            panic!("{error:#}")
        })
    }
}
