//! Implements `raven-lab` and `cargo xtask lab`: labs for manual work.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::Lab;
use crate::namespace::Namespace;
use crate::site::{Masquerade, MasqueradeBy, Site};
use crate::teardown::{self, LABS, down, down_all};

/// Manage the labs of this machine.
#[derive(Subcommand, Debug)]
pub enum LabCommand {
    /// Build the three-pool lab with an API server, and keep it.
    Up(Up),
    /// Remove one lab, or all of them.
    Down {
        /// ID of the lab; see `list`.
        #[arg(required_unless_present = "all")]
        id: Option<String>,
        /// Remove all labs without a running owner: kept ones and leftovers.
        #[arg(long, conflicts_with = "id")]
        all: bool,
    },
    /// List the labs of this machine.
    List,
    /// Run a command (or a shell) on a node, pod or router of a lab.
    Enter {
        /// ID of the lab.
        id: String,
        /// Node, pod, `<pool>-router`, `inet` or `cp`.
        place: String,
        /// Command to run; a shell if omitted.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

/// Build a lab.
#[derive(Args, Debug)]
pub struct Up {
    /// Create this number of pods on each node.
    #[arg(long, default_value_t = 1)]
    pods: u8,
    /// Build the network only, without an API server.
    #[arg(long)]
    no_kubernetes: bool,
    /// Install no CRDs, no manifests of deploy/ and no Gateways.
    #[arg(long)]
    no_crds: bool,
    /// Create no Gateways.
    #[arg(long)]
    no_gateways: bool,
    /// Keep running, and remove the lab on Ctrl-C or when this process ends for any reason.
    #[arg(long)]
    hold: bool,
    /// Also start the controller and all agents, which must be built.
    #[arg(long)]
    agents: bool,
    /// Exclude all pods of the cluster from the CNI's masquerade, as flannel does.
    #[arg(long)]
    flannel_masquerade: bool,
    /// Write the CNI's masquerade with iptables instead of an nftables table.
    #[arg(long)]
    iptables_masquerade: bool,
}

/// Runs a command.
pub async fn run(command: LabCommand) -> Result<()> {
    match command {
        LabCommand::Up(up) => self::up(up).await,
        LabCommand::Down { id: Some(id), .. } => down(&id),
        LabCommand::Down { .. } => {
            for id in down_all()? {
                println!("{id} removed");
            }
            Ok(())
        }
        LabCommand::List => list(),
        LabCommand::Enter { id, place, command } => enter(&id, &place, &command),
    }
}

async fn up(up: Up) -> Result<()> {
    let masquerade = if up.flannel_masquerade { Masquerade::BeyondCluster } else { Masquerade::BeyondPool };
    let by = if up.iptables_masquerade { MasqueradeBy::Iptables } else { MasqueradeBy::Nftables };
    let mut builder = Lab::builder().pods_per_node(up.pods).masquerade(masquerade, by);
    if up.no_kubernetes {
        builder = builder.without_kubernetes();
    }
    if up.no_crds {
        builder = builder.without_crds();
    }
    let mut lab = builder.up().await?;
    if lab.has_cluster() {
        prepare(&lab, &up).await?;
    }
    if !up.hold {
        lab.keep()?;
    }
    println!("{}", lab.how_to_enter());
    let kubeconfig = lab.dir.join("nodes/NODE/kubeconfig");
    println!("  run an agent in a node: raven-agent --node-name NODE --kubeconfig {}", kubeconfig.display());
    println!("  enter: cargo xtask lab enter {id} NODE|POD|POOL-router|inet|cp [COMMAND]", id = lab.id);
    println!("  remove: cargo xtask lab down {}", lab.id);
    if up.hold {
        tokio::signal::ctrl_c().await?;
    }
    Ok(())
}

async fn prepare(lab: &Lab, up: &Up) -> Result<()> {
    eprintln!("Kubernetes: {}", lab.cluster().origin());
    // The manifests contain the service accounts.
    if up.no_crds {
        return Ok(());
    }
    if !up.no_gateways {
        lab.cluster().apply_gateways(lab).await?;
    }
    for node in &lab.nodes {
        lab.cluster().agent_kubeconfig(lab, node).await?;
    }
    lab.cluster().controller_kubeconfig(lab).await?;
    if up.agents {
        lab.start_controller().await?;
        lab.start_agents().await?;
    }
    Ok(())
}

fn list() -> Result<()> {
    for lab in teardown::labs() {
        let state = match lab.owner {
            Some(pid) => format!("owned by process {pid}"),
            None if lab.dir.join("keep").exists() => "kept".to_owned(),
            None => "leftover".to_owned(),
        };
        println!("{}  {state}  {}", lab.id, lab.dir.display());
    }
    Ok(())
}

/// Replaces this process by the command, so that its output and exit status are the command's.
fn enter(id: &str, place: &str, command: &[String]) -> Result<()> {
    let site = load(id)?;
    let ns = find(&site, place).with_context(|| format!("lab {id} has no {place}"))?;
    let words = ns.nsenter();
    let shell = [std::env::var("SHELL").unwrap_or_else(|_| "sh".to_owned())];
    let command = if command.is_empty() { &shell[..] } else { command };
    bail!(Command::new(&words[0]).args(&words[1..]).args(command).exec());
}

/// Reads the description of a lab.
pub fn load(id: &str) -> Result<Site> {
    let file = Path::new(LABS).join(id).join("site.json");
    let text = fs::read(&file)
        .with_context(|| format!("read {} (does lab {id} exist? see `cargo xtask lab list`)", file.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

fn find(site: &Site, place: &str) -> Option<Namespace> {
    let name = format!("{}-{place}", site.id);
    site.namespaces().into_iter().find(|ns| ns.name == name).cloned()
}
