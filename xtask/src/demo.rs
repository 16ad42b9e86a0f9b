//! `cargo xtask demo`: connects three isolated pools, checks all properties, and removes the lab.
//!
//! The checks are those of the tests (`raven_tests::proof`), run as one sequence.

use std::io::IsTerminal;

use anyhow::{Result, bail};
use comfy_table::{Cell, Color, ContentArrangement, Table, presets::UTF8_HORIZONTAL_ONLY};
use raven_tests::{
    Lab,
    kubectl::{self, POD, SCRIPT},
    kubelet::Prefer,
    proof::{self, Check, FAMILIES},
};

use tokio::task::JoinHandle;

use crate::{
    build, progress,
    setup::{self, Need},
};

/// Arguments of `demo`.
#[derive(clap::Args)]
pub(crate) struct Demo {
    /// Keep the lab and print how to inspect it.
    #[arg(long)]
    keep: bool,
    /// Print only one JSON object on standard output.
    #[arg(long)]
    json: bool,
}

/// Size of the demo's transfers in bytes.
const BULK: u64 = 50_000_000;

impl Demo {
    /// Runs the demo. Fails if a check fails.
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let mut results = Results::default();
        let result = runtime.block_on(self.check(&mut results));
        if let Err(error) = result {
            results.note(Check::new("the demo completes", Err(error)));
        }
        let ok = results.checks.iter().all(|c| c.ok);
        if self.json {
            println!("{}", serde_json::json!({ "ok": ok, "checks": results.checks }));
        } else {
            println!("{}", table(&results.checks));
        }
        if !ok {
            bail!("{} of {} checks failed", results.checks.iter().filter(|c| !c.ok).count(), results.checks.len());
        }
        Ok(())
    }

    async fn check(&self, results: &mut Results) -> Result<()> {
        progress::step("checking tools");
        let first = [Need::Build, Need::Ebpf, Need::Lab, Need::Kubernetes];
        setup::ensure_packages(&[&first[..], &[Need::Kubelet]].concat())?;
        // Only the second half of the demo needs the kubelet, whose first build takes minutes.
        let kubelet = tokio::task::spawn_blocking(|| setup::ensure(&[Need::Kubelet]));
        setup::ensure_and_build(&first, vec![build::binaries_task()])?;
        progress::step(
            "creating the lab: a cloud pool and two edge pools behind NAT, two nodes each, and a Kubernetes API server",
        );
        let mut lab = Lab::builder().up().await?;
        let result = check_all(&lab, kubelet, results).await;
        if result.is_err() || results.checks.iter().any(|c| !c.ok) {
            progress::step(&format!("evidence: {}", lab.save_failure("demo")?.display()));
        }
        if self.keep {
            lab.keep()?;
            print_instructions(&lab);
        } else {
            progress::step("removing the lab");
        }
        result
    }
}

/// Checks L3, then L7. `kubelet`: the build of its programs.
async fn check_all(lab: &Lab, kubelet: JoinHandle<Result<()>>, results: &mut Results) -> Result<()> {
    results.check("the pools are isolated without Raven", proof::isolated(lab).await);
    lab.cluster().apply_gateways(lab.site()).await?;
    progress::step("starting raven-controller, and raven-agent on every node");
    let _controller = lab.start_controller().await?;
    let mut agents = lab.start_agents().await?;
    results.check("the pools are connected", proof::converged(lab).await);
    let before = proof::all_counters(lab)?;
    proof::watch_netfilter(lab)?;
    for (n, family) in FAMILIES.iter().enumerate() {
        results.check(
            format!("{family}: {} from cloud-b to x-b", megabytes()),
            proof::bulk(lab, "cloud-b", "x-b", n, BULK).await,
        );
        results.check(
            format!("{family}: {} from x-b to y-b, relayed", megabytes()),
            proof::bulk(lab, "x-b", "y-b", n, BULK).await,
        );
    }
    results.check("packets were redirected, not seen by netfilter and conntrack", proof::redirected(lab, &before, 100));
    let internet = proof::record(lab).await?;
    for (a, b) in proof::pairs(lab) {
        for (n, family) in FAMILIES.iter().enumerate() {
            results.check(format!("{family}: {} ↔ {}", a.spec.name, b.spec.name), proof::reach(lab, &a, &b, n).await);
        }
    }
    results.check("WireGuard sessions", proof::handshakes(lab).await);
    results.check("MTU", proof::mtu(lab, "cloud-b", "y-b").await);
    results.check(
        "agents killed and restarted under 1,000 packets/s",
        proof::restart(lab, &mut agents, "x-b", "y-b", 0).await,
    );
    results.check("no packet was dropped", proof::no_drops(lab, &before));
    let internet = internet.stop().await?;
    results.check("nothing crossed the internet unencrypted", proof::encrypted(lab, &internet));
    if !kubelet.is_finished() {
        progress::step("waiting for the build of the kubelet");
    }
    kubelet.await??;
    kubelets(lab, results).await
}

/// Checks L7: kubectl, through real API servers, to a real kubelet at a site behind NAT.
async fn kubelets(lab: &Lab, results: &mut Results) -> Result<()> {
    progress::step("starting a real kubelet with containerd on x-b, behind its site's NAT, and a pod");
    let _kubelet = lab.start_kubelet("x-b").await?;
    lab.run_pod("x-b", POD, SCRIPT).await?;
    for (node, prefer, path) in [
        ("cloud-b", Prefer::Hostname, "by name, API server on a member"),
        ("cloud-a", Prefer::InternalIP, "by address, API server on the gateway node"),
        ("cloud-b", Prefer::InternalIP, "by address, API server on a member"),
    ] {
        let addressing = path.split(',').next().unwrap_or_default();
        progress::step(&format!("starting an API server on {node} that addresses kubelets {addressing}"));
        let server = lab.api_server_on(node, prefer).await?;
        let megabytes = if prefer == Prefer::Hostname { 100 } else { 5 };
        kubectl::all(&server, path, megabytes).into_iter().for_each(|check| results.note(check));
        server.kill()?;
    }
    Ok(())
}

fn megabytes() -> String {
    format!("{} MB", BULK / 1_000_000)
}

/// Collects checks and prints them on standard error.
#[derive(Default)]
struct Results {
    checks: Vec<Check>,
}

impl Results {
    fn check(&mut self, name: impl Into<String>, result: Result<String>) {
        self.note(Check::new(name, result));
    }

    fn note(&mut self, check: Check) {
        let sign = if check.ok { "✓" } else { "✗" };
        progress::step(&format!("{sign} {}: {}", check.name, check.detail));
        self.checks.push(check);
    }
}

fn table(checks: &[Check]) -> Table {
    let colour = std::io::stdout().is_terminal();
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["", "check", "result"]);
    if !colour {
        // A pipe has no width.
        table.set_width(140);
    }
    for check in checks {
        let (sign, paint) = if check.ok { ("✓", Color::Green) } else { ("✗", Color::Red) };
        let sign = Cell::new(sign);
        table.add_row([if colour { sign.fg(paint) } else { sign }, Cell::new(&check.name), Cell::new(&check.detail)]);
    }
    table
}

fn print_instructions(lab: &Lab) {
    eprintln!("\nThe lab is kept. To inspect it:\n");
    eprintln!("{}", lab.how_to_enter());
    eprintln!("  on a gateway node (x-a):");
    eprintln!("    bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/REMOTE4");
    eprintln!("    bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/COUNTERS");
    eprintln!("    wg show; ip route show table 9027; ip rule; bpftool net");
    eprintln!("  from outside:");
    eprintln!("    kubectl --kubeconfig {}/kubeconfig get gateways,gatewaynodes -o wide\n", lab.dir.display());
}
