//! Runs the Raven binaries: agents in their nodes' namespaces, the controller in that of the API server.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::memory_limit::MemoryLimit;
use crate::process::Process;
use crate::site::Node;

/// Starts a program with the rights of the agent's container (deploy/agent.yaml): these capabilities only, and what
/// container runtimes mount read-only.
const AS_IN_THE_POD: &str = r#"
    mkdir -p /run/raven/sysctl-net
    mount --bind /proc/sys/net /run/raven/sysctl-net
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys
    mount -o remount,bind,ro /sys
    exec setpriv --inh-caps=-all --bounding-set=-all,+net_admin,+sys_admin,+sys_resource "$@"
"#;

/// A running agent, with the data to restart it.
#[derive(Debug)]
pub struct Agent {
    /// Node of the agent.
    pub node: Node,
    /// Process of the agent.
    pub process: Process,
    /// Command-line arguments, without the node's name.
    pub arguments: Vec<String>,
    logs: PathBuf,
    contained: bool,
    limit: Option<MemoryLimit>,
}

impl Agent {
    fn spawn(
        node: &Node,
        arguments: &[String],
        logs: &Path,
        contained: bool,
        limit: Option<&MemoryLimit>,
    ) -> Result<Process> {
        let program = binary("raven-agent")?;
        // On an emulated processor each further program takes a second, and agents are started many times.
        let emulated = std::env::var_os("RAVEN_TEST_PATIENCE").is_some();
        let mut command = node.ns.command("unshare");
        command.args(["--mount", "--propagation", "slave"]);
        if contained {
            command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        }
        if let Some(limit) = limit {
            command.args(["sh", "-ec", r#"echo $$ > "$0"; exec "$@""#]).arg(limit.entrance());
        }
        if !emulated {
            command.args(["sh", "-ec", AS_IN_THE_POD, "sh"]);
        }
        command.arg(&program);
        command.arg("--node-name").arg(&node.name).args(arguments).env("RUST_LOG", log_filter());
        Process::start(format!("agent-{}", node.name), logs, command)
    }

    /// From the next start on, the agent is the first process of a PID namespace, as in a container: when it ends, the
    /// kernel kills all of its child processes.
    pub fn contain(&mut self) {
        self.contained = true;
    }

    /// From the next start on, the agent and its child processes have this limit.
    pub fn limit_memory(&mut self, limit: MemoryLimit) {
        self.limit = Some(limit);
    }

    /// The limit of memory, if there is one.
    pub fn memory_limit(&self) -> Option<&MemoryLimit> {
        self.limit.as_ref()
    }

    /// Kills the agent with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts the agent again; kills it first if it runs.
    pub fn restart(&mut self) -> Result<()> {
        if self.process.ended()?.is_none() {
            self.process.kill()?;
        }
        self.process = Self::spawn(&self.node, &self.arguments, &self.logs, self.contained, self.limit.as_ref())?;
        Ok(())
    }
}

/// Arguments of the controller: the address of its webhook, beside the API server, which reaches it without a Service.
pub const WEBHOOK: [&str; 2] = ["--webhook-bind-addr=10.0.0.5:9443", "--webhook-url=https://10.0.0.5:9443"];

impl Lab {
    /// Starts the agent of a node with a token bound to the node.
    pub async fn start_agent(&self, node: &str) -> Result<Agent> {
        let kubeconfig = self.cluster().agent_kubeconfig(self, self.node(node)).await?;
        self.start_agent_with(node, vec!["--kubeconfig".to_owned(), kubeconfig.to_string_lossy().into_owned()])
    }

    /// Starts the agent of a node with the given arguments (such as `--offline`), which a restart reuses.
    pub fn start_agent_with(&self, node: &str, arguments: Vec<String>) -> Result<Agent> {
        let (node, logs) = (self.node(node).clone(), self.logs());
        let process = Agent::spawn(&node, &arguments, &logs, false, None)?;
        Ok(Agent { node, process, arguments, logs, contained: false, limit: None })
    }

    /// Starts the agents of all nodes.
    pub async fn start_agents(&self) -> Result<Vec<Agent>> {
        let mut agents = Vec::new();
        for node in &self.nodes {
            agents.push(self.start_agent(&node.name).await?);
        }
        Ok(agents)
    }

    /// Starts the controller in the control plane's namespace with the token of its service account.
    pub async fn start_controller(&self) -> Result<Process> {
        self.start_controller_with(&[]).await
    }

    /// Like [`Lab::start_controller`], with further arguments.
    pub async fn start_controller_with(&self, arguments: &[&str]) -> Result<Process> {
        let kubeconfig = self.cluster().controller_kubeconfig(self).await?;
        let mut command = self.control_plane.command(binary("raven-controller")?);
        command.arg("--kubeconfig").arg(kubeconfig).args(arguments).env("RUST_LOG", log_filter());
        Process::start("controller", &self.logs(), command)
    }

    /// Runs `raven-agent` with `args` (such as `cleanup`) in a node and returns its standard output.
    pub fn agent_command(&self, node: &str, args: &[&str]) -> Result<String> {
        let program = binary("raven-agent")?;
        self.node(node).ns.run(&program.to_string_lossy(), args)
    }
}

fn log_filter() -> String {
    std::env::var("RAVEN_LAB_LOG").unwrap_or_else(|_| "info".to_owned())
}

/// Returns the path of a Raven binary: in `RAVEN_BIN_DIR`, or beside the running program or its parent folder,
/// where cargo builds it.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("RAVEN_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        return path.is_file().then_some(path).with_context(|| format!("RAVEN_BIN_DIR contains no {name}"));
    }
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!("{name} not found beside {}: run `cargo build`, or set RAVEN_BIN_DIR", here.display()),
    }
}

/// Returns the path of the object `name` that `cargo xtask` built into `folder` (`ebpf` or `ebpf-trace`)
/// of the target folder.
pub fn ebpf_object(folder: &str, name: &str) -> Result<PathBuf> {
    let place = format!("{folder}/bpfel-unknown-none/release/{name}");
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).map(|dir| dir.join(&place)).find(|path| path.is_file());
    found.with_context(|| {
        format!("{place} not found in any folder above {}: run `cargo xtask test lab`, which builds it", here.display())
    })
}
