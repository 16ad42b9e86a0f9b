//! L7, whole: a real kubelet with containerd at an edge that nobody can dial, real API servers on cloud nodes, kubectl.

#![forbid(unsafe_code)]

mod certificates;
mod edges;
mod kubectl;
mod outages;

use std::time::Duration;

use anyhow::{Context, Result};
use raven_tests::{Lab, LabBuilder, agent::Agent, process::Process};

/// How long something may take that needs no more than a few messages.
const SOON: Duration = Duration::from_secs(40);

/// A lab in which everything runs.
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
        self.agents.iter_mut().find(|a| a.node.name == node).expect("every node has an agent")
    }

    /// Fails the test with what was seen, after saving what there is to look at.
    fn check<T>(&self, result: Result<T>) -> T {
        result.unwrap_or_else(|error| {
            let test = std::thread::current().name().unwrap_or("l7").to_owned();
            match self.lab.save_failure(&test).context("save what there is to look at") {
                Ok(folder) => eprintln!("saved in {}", folder.display()),
                Err(e) => eprintln!("{e:#}"),
            }
            panic!("{error:#}")
        })
    }
}
