//! `bench memory`: resident memory of agent, engine and controller in the three-pool lab, compared with its API server.

use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_tests::{Lab, process::memory_mb, proof};

/// Runs the benchmark.
pub(crate) fn run(json: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rows = runtime.block_on(measure())?;
    let server = rows
        .iter()
        .find(|(name, _)| name == "kube-apiserver")
        .map(|(_, mb)| *mb)
        .context("the API server was not measured")?;
    if json {
        let rows: serde_json::Map<_, _> =
            rows.into_iter().map(|(name, mb)| (name, serde_json::json!((mb * 10.0).round() / 10.0))).collect();
        println!("{}", serde_json::json!({ "resident_mb": rows }));
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(["program", "resident", "× kube-apiserver"]);
    for (name, mb) in &rows {
        table.add_row([name.clone(), format!("{mb:.0} MB"), format!("{:.3}", mb / server)]);
    }
    println!("{table}");
    Ok(())
}

async fn measure() -> Result<Vec<(String, f64)>> {
    let lab = Lab::builder().up().await?;
    lab.cluster().apply_gateways(lab.site()).await?;
    let controller = lab.start_controller().await?;
    let agents = lab.start_agents().await?;
    proof::converged(&lab).await?;
    // Memory used only at the start is released after some seconds.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let agent = |node: &str| {
        agents.iter().find(|a| a.node.name == node).map(|a| a.process.pid()).context("the node has no agent")
    };
    let mut rows = vec![
        ("raven-controller".to_owned(), resident(controller.pid())?),
        ("raven-agent, gateway node".to_owned(), resident(agent("cloud-a")?)?),
        ("raven-agent, ordinary node".to_owned(), resident(agent("cloud-b")?)?),
    ];
    for (name, word) in [("WireGuard engine", "wireguard-engine"), ("kube-apiserver", "kube-apiserver")] {
        rows.push((name.to_owned(), resident(find(word, &lab.id)?)?));
    }
    Ok(rows)
}

fn resident(pid: u32) -> Result<f64> {
    memory_mb(pid, "VmRSS")
}

/// Finds a process of this lab by a word of its command line.
fn find(word: &str, lab: &str) -> Result<u32> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let namespaced = std::process::Command::new("ip").args(["netns", "identify", &format!("{pid}")]).output();
        if line.contains(word) && namespaced.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains(lab)) {
            return Ok(pid);
        }
    }
    anyhow::bail!("lab {lab} has no process {word}")
}
