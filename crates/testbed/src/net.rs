//! A bridge and an address range of our own that no route of this machine uses.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// The second octets of the 10.x.0.0/16 ranges to choose from; the low ones are what people pick by hand.
const FIRST: u8 = 64;
const LAST: u8 = 254;

/// 10.`octet`.0.0/16: the lower half for the engine's default bridge, the upper half for its networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) octet: u8,
}

impl Range {
    pub(crate) fn bridge(self) -> String {
        format!("rpk{}", self.octet)
    }

    pub(crate) fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.octet, 0, 1)
    }

    pub(crate) fn all(self) -> String {
        format!("10.{}.0.0/16", self.octet)
    }

    pub(crate) fn networks(self) -> String {
        format!("10.{}.128.0/17", self.octet)
    }

    fn prefix(self) -> String {
        format!("10.{}.", self.octet)
    }
}

/// Makes the bridge of a free range. Making it is also the claim: a second process that chose the same range fails to make
/// the same bridge and takes the next.
pub(crate) fn claim() -> Result<Range> {
    let routes = process::text(Command::new("ip").args(["-o", "-4", "route"]))?;
    let taken = prefixes(&routes);
    let span = u32::from(LAST - FIRST) + 1;
    let start = std::process::id() % span;
    // First what nothing covers. Where one broad route covers all of 10/8 (a VPN), a /16 that nothing narrower uses.
    for narrower_than in [0, 16] {
        for step in 0..span {
            let octet = FIRST + u8::try_from((start + step) % span)?;
            let range = Range { octet };
            if taken.iter().any(|taken| taken.1 >= narrower_than && overlaps(*taken, octet)) {
                continue;
            }
            if process::run(Command::new("ip").args(["link", "add", "name", &range.bridge(), "type", "bridge"]))
                .is_err()
            {
                if link_exists(&range.bridge()) {
                    continue;
                }
                bail!("cannot make a network bridge: are you root, and does the kernel have bridges?");
            }
            let address = format!("{}/17", range.gateway());
            let made = process::run(Command::new("ip").args(["addr", "add", &address, "dev", &range.bridge()]))
                .and_then(|_| process::run(Command::new("ip").args(["link", "set", &range.bridge(), "up"])));
            if made.is_err() {
                release(range, false);
            }
            return made.map(|_| range).context("cannot bring the bridge up");
        }
    }
    bail!("every 10.x.0.0/16 range from 10.{FIRST} to 10.{LAST} is routed already on this machine")
}

/// Where the machine drops what it forwards (another engine sets that policy), lets our own range pass. Says whether it did.
pub(crate) fn allow_forwarding(range: Range) -> Result<bool> {
    let Ok(rules) = process::text(Command::new("iptables").args(["-w", "-S", "FORWARD"])) else {
        return Ok(false);
    };
    if !rules.lines().any(|rule| rule == "-P FORWARD DROP") {
        return Ok(false);
    }
    for direction in ["-s", "-d"] {
        process::run(Command::new("iptables").args(["-w", "-I", "FORWARD", direction, &range.all(), "-j", "ACCEPT"]))?;
    }
    Ok(true)
}

/// Takes away the bridge, every other bridge with an address in our range, and the rules of [`allow_forwarding`].
pub(crate) fn release(range: Range, rules: bool) {
    // Each step is tried whatever became of the others: this also runs after half a start.
    if rules {
        for direction in ["-s", "-d"] {
            process::run(Command::new("iptables").args([
                "-w",
                "-D",
                "FORWARD",
                direction,
                &range.all(),
                "-j",
                "ACCEPT",
            ]))
            .ok();
        }
    }
    let addresses = process::text(Command::new("ip").args(["-o", "-4", "addr"])).unwrap_or_default();
    let mut links: Vec<&str> = addresses
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let link = words.nth(1)?;
            words.nth(1)?.starts_with(&range.prefix()).then_some(link)
        })
        .filter(|link| link.starts_with("br-"))
        .collect();
    let bridge = range.bridge();
    links.push(&bridge);
    for link in links {
        process::run(Command::new("ip").args(["link", "delete", link])).ok();
    }
}

fn link_exists(name: &str) -> bool {
    std::path::Path::new("/sys/class/net").join(name).exists()
}

/// The destinations of `ip -o route`, as (address, prefix length); `default` is none.
fn prefixes(routes: &str) -> Vec<(Ipv4Addr, u8)> {
    routes
        .lines()
        .filter_map(|line| {
            let destination = line.split_whitespace().find(|word| word.contains('.'))?;
            if line.starts_with("default") {
                return None;
            }
            let (address, length) = destination.split_once('/').unwrap_or((destination, "32"));
            Some((address.parse().ok()?, length.parse().ok()?))
        })
        .collect()
}

fn overlaps((address, length): (Ipv4Addr, u8), octet: u8) -> bool {
    let common = length.min(16);
    let mask = if common == 0 { 0 } else { u32::MAX << (32 - u32::from(common)) };
    (u32::from(address) & mask) == (u32::from(Ipv4Addr::new(10, octet, 0, 0)) & mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_are_seen() {
        let check = |routes: &str, octet: u8, expect: bool| {
            assert_eq!(
                prefixes(routes).iter().any(|taken| overlaps(*taken, octet)),
                expect,
                "{routes} against 10.{octet}"
            );
        };
        check("default via 10.70.0.1 dev eth0", 70, false);
        check("10.70.0.0/16 dev eth0 proto kernel", 70, true);
        check("10.70.3.0/24 dev eth0 proto kernel", 70, true);
        check("10.70.3.7 dev eth0", 70, true);
        check("10.71.0.0/16 dev eth0", 70, false);
        check("10.64.0.0/10 via 192.0.2.1", 70, true);
        check("10.0.0.0/8 via 192.0.2.1", 70, true);
        check("172.17.0.0/16 dev docker0", 70, false);
        check("unreachable 10.70.0.0/16", 70, true);
    }
}
