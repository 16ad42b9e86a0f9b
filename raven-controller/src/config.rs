//! How to run: command line and environment, checked once.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use hyper::Uri;
use ipnet::IpNet;

/// The ConfigMap with the cluster-wide switches (name as upstream has it).
pub const CONFIG_MAP: &str = "raven-cfg";

/// Elects gateway nodes, keeps pools and prefixes apart, and says in each Gateway's status what is missing.
#[derive(Parser, Clone, Debug)]
#[command(name = "raven-controller", version)]
pub struct Config {
    /// Kubeconfig file. Left out: $KUBECONFIG, ~/.kube/config, or the Pod's service account.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the Lease and of ConfigMap raven-cfg.
    #[arg(long, env = "POD_NAMESPACE", default_value = raven_api::DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Name of the Lease by which replicas agree on who writes.
    #[arg(long, default_value = "raven-controller")]
    pub lease_name: String,
    /// Who this replica is in the Lease. Left out: host name and process id.
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,
    /// Where /healthz and /readyz are served; `:PORT` means all addresses.
    #[arg(long, default_value = ":10275", value_parser = parse_listen)]
    pub health_probe_addr: SocketAddr,
    /// Make Gateways by the three pool rules for nodes that no Gateway claims.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub auto_gateways: bool,
    /// Ranges of Service addresses, which no Gateway may claim; besides those that the API server tells by ServiceCIDR objects
    /// (Kubernetes 1.33 and later). May be given several times, or with commas.
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    pub service_cidr: Vec<IpNet>,
    /// Where the conversion webhook for Gateways of v1alpha1 is served; `:PORT` means all addresses, `off` switches it off.
    #[arg(long, default_value = ":9443", value_parser = parse_listen_or_off, value_name = "ADDRESS")]
    pub webhook_bind_addr: Listen,
    /// The Service by which the API server reaches the webhook. The Secret with its certificate has the same name and namespace.
    #[arg(long, default_value = raven_api::schema::WEBHOOK_SERVICE, value_name = "NAME")]
    pub webhook_service: String,
    /// The webhook's URL, where the API server reaches it by no Service: https://HOST:PORT, without a path.
    #[arg(long, value_name = "URL", value_parser = parse_webhook_url)]
    pub webhook_url: Option<Uri>,
    /// How log lines look. What is logged: $RUST_LOG, else `info`.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Where to listen, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// There.
    At(SocketAddr),
    /// Not at all.
    Off,
}

/// How log lines look.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Config {
    /// The name of this replica: unique also for two that run on one host.
    pub fn identity(&self) -> String {
        self.identity.clone().unwrap_or_else(|| {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host = if host.trim().is_empty() { "raven-controller" } else { host.trim() };
            format!("{host}_{}", std::process::id())
        })
    }
}

// Upstream and Go write ":10275"; an IPv6 socket on [::] takes IPv4 as well.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse().map_err(|e| format!("{e}: expected ADDRESS:PORT or :PORT"))
}

fn parse_listen_or_off(text: &str) -> Result<Listen, String> {
    if text == "off" { Ok(Listen::Off) } else { parse_listen(text).map(Listen::At) }
}

fn parse_webhook_url(text: &str) -> Result<Uri, String> {
    let url: Uri = text.trim_end_matches('/').parse().map_err(|e| format!("{e}"))?;
    let plain = url.scheme_str() == Some("https") && url.host().is_some() && url.path() == "/" && url.query().is_none();
    if plain { Ok(url) } else { Err("expected https://HOST:PORT, without a path".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_address_without_a_host_means_all() {
        assert_eq!(parse_listen(":10275").map(|a| a.to_string()), Ok("[::]:10275".to_owned()));
        assert_eq!(parse_listen("127.0.0.1:0").map(|a| a.to_string()), Ok("127.0.0.1:0".to_owned()));
        assert!(parse_listen("10275").is_err());
    }

    #[test]
    fn a_webhook_has_a_place_and_a_url_or_is_off() {
        let parse = |args: &[&str]| Config::try_parse_from([&["raven-controller"], args].concat()).map_err(|e| e.to_string());
        assert_eq!(parse(&["--webhook-bind-addr=off"]).map(|c| c.webhook_bind_addr), Ok(Listen::Off));
        let url = |text: &str| parse(&[&format!("--webhook-url={text}")]).map(|c| c.webhook_url.map(|u| u.to_string()));
        assert_eq!(url("https://10.0.0.5:9443"), Ok(Some("https://10.0.0.5:9443/".to_owned())));
        for bad in ["http://10.0.0.5:9443", "https://10.0.0.5:9443/convert", "10.0.0.5:9443"] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_can_be_switched_off() {
        let config = Config::try_parse_from(["raven-controller", "--auto-gateways=false"]).expect("a valid command line");
        assert!(!config.auto_gateways);
        assert!(Config::try_parse_from(["raven-controller"]).expect("all have defaults").auto_gateways);
    }
}
