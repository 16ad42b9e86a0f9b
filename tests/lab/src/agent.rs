//! The Raven binaries, run where they belong: an agent in its node's namespaces, the controller beside the API server.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::process::Process;
use crate::site::Node;

/// A running agent and what it needs to be started again.
#[derive(Debug)]
pub struct Agent {
    /// Its node.
    pub node: Node,
    /// The program.
    pub process: Process,
    /// Its arguments besides the node's name.
    pub arguments: Vec<String>,
    logs: PathBuf,
}

impl Agent {
    fn spawn(node: &Node, arguments: &[String], logs: &Path) -> Result<Process> {
        let mut command = node.ns.command(binary("raven-agent")?);
        command.arg("--node-name").arg(&node.name).args(arguments).env("RUST_LOG", log_filter());
        Process::start(format!("agent-{}", node.name), logs, command)
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it anew, after [`Agent::kill`] or instead of the running one.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.ended()?.is_none() {
            self.process.kill()?;
        }
        self.process = Self::spawn(&self.node, &self.arguments, &self.logs)?;
        Ok(())
    }
}

impl Lab {
    /// Starts the agent of a node, with the node's own bound token.
    pub async fn start_agent(&self, node: &str) -> Result<Agent> {
        let kubeconfig = self.cluster().agent_kubeconfig(self, self.node(node)).await?;
        self.start_agent_with(node, vec!["--kubeconfig".to_owned(), kubeconfig.to_string_lossy().into_owned()])
    }

    /// Starts the agent of a node with other arguments (`--offline`, …), which a restart uses again.
    pub fn start_agent_with(&self, node: &str, arguments: Vec<String>) -> Result<Agent> {
        let (node, logs) = (self.node(node).clone(), self.logs());
        let process = Agent::spawn(&node, &arguments, &logs)?;
        Ok(Agent { node, process, arguments, logs })
    }

    /// Starts the agents of all nodes.
    pub async fn start_agents(&self) -> Result<Vec<Agent>> {
        let mut agents = Vec::new();
        for node in &self.nodes {
            agents.push(self.start_agent(&node.name).await?);
        }
        Ok(agents)
    }

    /// Starts the controller in the control plane's namespace, with the token of its service account.
    pub async fn start_controller(&self) -> Result<Process> {
        let kubeconfig = self.cluster().controller_kubeconfig(self).await?;
        let mut command = self.control_plane.command(binary("raven-controller")?);
        command.arg("--kubeconfig").arg(kubeconfig).env("RUST_LOG", log_filter());
        Process::start("controller", &self.logs(), command)
    }

    /// Runs `raven-agent` with other arguments (`cleanup`, …) in a node and gives its output.
    pub fn agent_command(&self, node: &str, args: &[&str]) -> Result<String> {
        let program = binary("raven-agent")?;
        self.node(node).ns.run(&program.to_string_lossy(), args)
    }
}

fn log_filter() -> String {
    std::env::var("RAVEN_LAB_LOG").unwrap_or_else(|_| "info".to_owned())
}

/// Finds one of our binaries: `RAVEN_BIN_DIR`, else where cargo put the running program (tests sit in `deps/` below it).
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("RAVEN_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        return path.is_file().then_some(path).with_context(|| format!("RAVEN_BIN_DIR has no {name}"));
    }
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!("{name} is not built: it is not beside {} (`cargo build`, or set RAVEN_BIN_DIR)", here.display()),
    }
}

/// Finds an eBPF object that `cargo xtask` built: `ebpf` or `ebpf-trace`, and the object's name. Beside it lies what cargo built.
pub fn ebpf_object(folder: &str, name: &str) -> Result<PathBuf> {
    let place = format!("{folder}/bpfel-unknown-none/release/{name}");
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).map(|dir| dir.join(&place)).find(|path| path.is_file());
    found.with_context(|| format!("there is no {place} above {}: `cargo xtask test lab` builds it", here.display()))
}
