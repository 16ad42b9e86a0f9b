//! `cargo xtask demo`: three pools that cannot reach each other talk, before your eyes, and everything is taken away again.
//!
//! The proofs are those of the tests (`raven_tests::proof`); here they are run in the order of a story and shown.

use std::io::{IsTerminal, Write, stderr};

use anyhow::{Result, bail};
use comfy_table::{Cell, Color, ContentArrangement, Table, presets::UTF8_HORIZONTAL_ONLY};
use raven_tests::{
    Lab,
    kubectl::{self, POD, SCRIPT},
    kubelet::Prefer,
    proof::{self, Check, FAMILIES},
};

use crate::{
    build,
    setup::{self, Need},
};

/// Arguments of `demo`.
#[derive(clap::Args)]
pub(crate) struct Demo {
    /// Leave the lab up and say how to look around.
    #[arg(long)]
    keep: bool,
    /// One JSON object on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

/// Size of the demo's transfers, bytes.
const BULK: u64 = 50_000_000;

impl Demo {
    /// Runs it; an error if a promise did not hold.
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let mut story = Story::default();
        let result = runtime.block_on(self.tell(&mut story));
        if let Err(error) = result {
            story.note(Check::new("the demo runs to its end", Err(error)));
        }
        let ok = story.checks.iter().all(|c| c.ok);
        if self.json {
            println!("{}", serde_json::json!({ "ok": ok, "checks": story.checks }));
        } else {
            println!("{}", table(&story.checks));
        }
        if !ok {
            bail!("{} of {} promises did not hold", story.checks.iter().filter(|c| !c.ok).count(), story.checks.len());
        }
        Ok(())
    }

    async fn tell(&self, story: &mut Story) -> Result<()> {
        story.say("looking for tools");
        setup::ensure(&[Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes, Need::Kubelet])?;
        story.say("building raven-controller and raven-agent (the eBPF programs with it)");
        build::binaries()?;
        story.say("building the lab: a cloud pool and two edge pools behind NAT, two nodes each, and a Kubernetes API server");
        let mut lab = Lab::builder().up().await?;
        let result = prove(&lab, story).await;
        if result.is_err() || story.checks.iter().any(|c| !c.ok) {
            story.say(&format!("kept for you: {}", lab.save_failure("demo")?.display()));
        }
        if self.keep {
            lab.keep()?;
            look_around(&lab);
        } else {
            story.say("taking the lab down");
        }
        result
    }
}

async fn prove(lab: &Lab, story: &mut Story) -> Result<()> {
    story.prove("without Raven the pools cannot reach each other", proof::isolated(lab).await);
    lab.cluster().apply_gateways(lab.site()).await?;
    story.say("starting raven-controller, and raven-agent on every node");
    let _controller = lab.start_controller().await?;
    let mut agents = lab.start_agents().await?;
    story.prove("the pools find each other", proof::converged(lab).await);
    let before = proof::all_counters(lab)?;
    proof::watch_netfilter(lab)?;
    for (n, family) in FAMILIES.iter().enumerate() {
        story.prove(format!("{family}: {} from cloud-b to x-b", megabytes()), proof::bulk(lab, "cloud-b", "x-b", n, BULK).await);
        story.prove(format!("{family}: {} from x-b to y-b, relayed", megabytes()), proof::bulk(lab, "x-b", "y-b", n, BULK).await);
    }
    story.prove("packets took the redirect programs, netfilter and conntrack saw none", proof::redirected(lab, &before, 100));
    let internet = proof::record(lab).await?;
    for (a, b) in proof::pairs(lab) {
        for (n, family) in FAMILIES.iter().enumerate() {
            story.prove(format!("{family}: {} ↔ {}", a.spec.name, b.spec.name), proof::reach(lab, &a, &b, n).await);
        }
    }
    story.prove("WireGuard sessions", proof::handshakes(lab).await);
    story.prove("MTU", proof::mtu(lab, "cloud-b", "y-b").await);
    story.prove("agents killed and restarted under 1,000 packets/s", proof::restart(lab, &mut agents, "x-b", "y-b", 0).await);
    story.prove("nothing was dropped", proof::no_drops(lab, &before));
    let internet = internet.stop().await?;
    story.prove("nothing crossed the internet in clear", proof::encrypted(lab, &internet));
    kubelets(lab, story).await
}

/// The other half: kubectl, through real API servers, to a real kubelet at a site that nobody can dial.
async fn kubelets(lab: &Lab, story: &mut Story) -> Result<()> {
    story.say("starting a real kubelet with containerd on x-b, behind its site's NAT, and a pod there");
    let _kubelet = lab.start_kubelet("x-b").await?;
    lab.run_pod("x-b", POD, SCRIPT).await?;
    for (node, prefer, way) in [
        ("cloud-b", Prefer::Hostname, "by name, API server on an ordinary node"),
        ("cloud-a", Prefer::InternalIP, "by address, API server on the gateway node"),
        ("cloud-b", Prefer::InternalIP, "by address, API server on an ordinary node"),
    ] {
        story.say(&format!("starting an API server on {node} that addresses kubelets {}", way.split(',').next().unwrap_or_default()));
        let server = lab.api_server_on(node, prefer).await?;
        let megabytes = if prefer == Prefer::Hostname { 100 } else { 5 };
        kubectl::all(&server, way, megabytes).into_iter().for_each(|check| story.note(check));
        server.kill()?;
    }
    Ok(())
}

fn megabytes() -> String {
    format!("{} MB", BULK / 1_000_000)
}

/// Collects checks and shows progress on standard error.
#[derive(Default)]
struct Story {
    checks: Vec<Check>,
}

impl Story {
    fn say(&self, text: &str) {
        let _ = writeln!(stderr(), "· {text}");
    }

    fn prove(&mut self, name: impl Into<String>, result: Result<String>) {
        self.note(Check::new(name, result));
    }

    fn note(&mut self, check: Check) {
        let sign = if check.ok { "✓" } else { "✗" };
        let _ = writeln!(stderr(), "{sign} {}: {}", check.name, check.detail);
        self.checks.push(check);
    }
}

fn table(checks: &[Check]) -> Table {
    let colour = std::io::stdout().is_terminal();
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic).set_header(["", "what", "seen"]);
    if !colour {
        // Nobody says how wide a pipe is.
        table.set_width(140);
    }
    for check in checks {
        let (sign, paint) = if check.ok { ("✓", Color::Green) } else { ("✗", Color::Red) };
        let sign = Cell::new(sign);
        table.add_row([if colour { sign.fg(paint) } else { sign }, Cell::new(&check.name), Cell::new(&check.detail)]);
    }
    table
}

fn look_around(lab: &Lab) {
    eprintln!("\nThe lab stays. Look around:\n");
    eprintln!("{}", lab.how_to_enter());
    eprintln!("  then, on a gateway node (x-a):");
    eprintln!("    bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/REMOTE4");
    eprintln!("    bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/COUNTERS");
    eprintln!("    wg show; ip route show table 9027; ip rule; bpftool net");
    eprintln!("  and from outside:");
    eprintln!("    kubectl --kubeconfig {}/kubeconfig get gateways,gatewaynodes -o wide\n", lab.dir.display());
}
