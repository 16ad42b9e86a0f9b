//! L7 tests: a real kubelet with containerd on an edge behind NAT, real API servers on cloud nodes, and kubectl.

#![forbid(unsafe_code)]

mod certificates;
mod clouds;
mod edges;
mod kubectl;
mod liveness;
mod metrics;
mod outages;

use std::time::Duration;

use anyhow::{Context, Result};
use raven_tests::{Lab, LabBuilder, agent::Agent, process::Process};

/// Time limit for operations that need only a few messages.
const SOON: Duration = Duration::from_secs(40);

/// A lab with a running controller and agents.
struct Running {
    agents: Vec<Agent>,
    _controller: Process,
    lab: Lab,
}

impl Running {
    async fn of(builder: LabBuilder) -> Result<Self> {
        let lab = builder.up().await?;
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
            let test = std::thread::current().name().unwrap_or("l7").to_owned();
            match self.lab.save_failure(&test).context("save evidence") {
                Ok(folder) => eprintln!("evidence: {}", folder.display()),
                Err(e) => eprintln!("{e:#}"),
            }
            panic!("{error:#}")
        })
    }
}
