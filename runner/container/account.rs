//! Who a program runs as: names of a container resolved in its own `/etc/passwd` and `/etc/group`.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use super::spec::{Failure, Result, Step};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, `gid` among them: as docker has it since CVE-2022-36109.
    pub groups: Vec<u32>,
    pub home: String,
}

/// More than any real file of accounts; what is longer is not read.
const FILE_BYTES: u64 = 16 << 20;

/// Resolves `user[:group]` in the root that this process is in.
pub fn resolve(user: &str) -> Result<Account> {
    find(user, &read("/etc/passwd")?, &read("/etc/group")?).map_err(Failure::Invalid)
}

/// A regular file, or the empty text where there is none. An image's `/etc/passwd` may be anything, a fifo for one.
fn read(path: &str) -> Result<String> {
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = match opened {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(String::new());
        }
        opened => opened.step(format!("open {path} of the container"))?,
    };
    if !file.metadata().step(format!("read {path} of the container"))?.is_file() {
        return Err(Failure::Invalid(format!("{path} of the container is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut bytes).step(format!("read {path} of the container"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn find(user: &str, passwd: &str, group: &str) -> Result<Account, String> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = rows(passwd, 7).find(|row| row[0] == user).or_else(|| {
        let uid: u32 = user.parse().ok()?;
        rows(passwd, 7).find(|row| row[2].parse() == Ok(uid))
    });
    let uid = match (&entry, user.parse::<u32>()) {
        (Some(row), _) => number(row[2], "/etc/passwd")?,
        (None, Ok(uid)) => uid,
        (None, Err(_)) => return Err(format!("user {user:?} is not in the image's /etc/passwd")),
    };
    let name = entry.as_ref().map_or("", |row| row[0]);
    let home = entry.as_ref().map_or("", |row| row[5]);
    let home = if home.is_empty() { "/" } else { home }.to_owned();
    let Some(wanted) = wanted_group.filter(|group| !group.is_empty()) else {
        let gid = entry.as_ref().map_or(Ok(0), |row| number(row[3], "/etc/passwd"))?;
        return Ok(Account { uid, gid, groups: with_primary(gid, memberships(group, name, gid)), home });
    };
    // An explicit group stands alone, as with docker.
    let gid = match rows(group, 3).find(|row| row[0] == wanted) {
        Some(row) => number(row[2], "/etc/group")?,
        None => wanted.parse().map_err(|_| format!("group {wanted:?} is not in the image's /etc/group"))?,
    };
    Ok(Account { uid, gid, groups: vec![gid], home })
}

fn with_primary(gid: u32, mut groups: Vec<u32>) -> Vec<u32> {
    groups.insert(0, gid);
    groups
}

fn memberships(group: &str, user: &str, primary: u32) -> Vec<u32> {
    let lists =
        |row: &Vec<&str>| !user.is_empty() && row.get(3).is_some_and(|users| users.split(',').any(|name| name == user));
    rows(group, 3).filter(lists).filter_map(|row| row[2].parse().ok()).filter(|&gid| gid != primary).collect()
}

fn rows(text: &str, fields: usize) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.trim().split(':').collect::<Vec<_>>()).filter(move |row| row.len() >= fields)
}

fn number(text: &str, file: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{text:?} in the image's {file} is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:,,,:/home/app:/bin/sh\nbad:x:x:1:::\nshort\n1234:x:77:78::/n:/s\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:app,other\nwheel:x:10:app\nappg:x:1001:app\nbadg:x:y:\n";

    #[test]
    fn users_and_groups_are_resolved_as_docker_does() {
        let check = |user: &str, expect: Result<(u32, u32, &[u32], &str), &str>| {
            let found = find(user, PASSWD, GROUP);
            let expect = expect
                .map(|(uid, gid, groups, home)| Account { uid, gid, groups: groups.to_vec(), home: home.to_owned() })
                .map_err(str::to_owned);
            assert_eq!(found, expect, "{user:?}");
        };
        check("", Ok((0, 0, &[0], "/root")));
        check("app", Ok((1000, 1001, &[1001, 50, 10], "/home/app")));
        check("1000", Ok((1000, 1001, &[1001, 50, 10], "/home/app")));
        check("app:", Ok((1000, 1001, &[1001, 50, 10], "/home/app")));
        check("app:staff", Ok((1000, 50, &[50], "/home/app")));
        check("app:7", Ok((1000, 7, &[7], "/home/app")));
        check("4000", Ok((4000, 0, &[0], "/")));
        check("4000:wheel", Ok((4000, 10, &[10], "/")));
        check(":wheel", Ok((0, 10, &[10], "/root")));
        check("1234", Ok((77, 78, &[78], "/n"))); // a name before a number
        check("nobody", Err("user \"nobody\" is not in the image's /etc/passwd"));
        check("app:none", Err("group \"none\" is not in the image's /etc/group"));
        check("bad", Err("\"x\" in the image's /etc/passwd is not a number"));
        check("99999999999", Err("user \"99999999999\" is not in the image's /etc/passwd"));
    }
}
