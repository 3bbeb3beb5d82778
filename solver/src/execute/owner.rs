//! `--chown` and `--chmod`: names and letters to numbers.

use std::io::{self, Read as _};
use std::path::Path;

use rustix::fs::OFlags;

use crate::context::{Disk, resolve_new};
use crate::graph::Owner;

use super::CopyError;

/// No account file is larger; a hostile one is not read to its end.
const ACCOUNTS_MAX_BYTES: u64 = 16 << 20;

/// User and group as numbers, by the root's own `/etc/passwd` and `/etc/group`. A user given by number alone has
/// the group of that number; one given by name has its own group.
pub(crate) fn resolve(owner: &Owner, root: &Disk) -> Result<(u32, u32), CopyError> {
    let (uid, own_group) = match owner.user.parse() {
        Ok(uid) => (uid, uid),
        Err(_) => account(root, "etc/passwd", &owner.user)?.ok_or_else(|| CopyError::Unknown {
            what: "user",
            name: owner.user.clone(),
            file: "/etc/passwd",
        })?,
    };
    let Some(group) = &owner.group else { return Ok((uid, own_group)) };
    let gid = match group.parse() {
        Ok(gid) => gid,
        Err(_) => {
            let found = account(root, "etc/group", group)?;
            found.ok_or_else(|| CopyError::Unknown { what: "group", name: group.clone(), file: "/etc/group" })?.0
        }
    };
    Ok((uid, gid))
}

/// The third and fourth field of the line that begins with `name`; a group has no fourth number.
fn account(root: &Disk, file: &str, name: &str) -> Result<Option<(u32, u32)>, CopyError> {
    let context = |source: io::Error| CopyError::Io { action: "read", path: Path::new("/").join(file), source };
    let real = resolve_new(root, Path::new(file))?;
    let file = match root.open(&real, OFlags::RDONLY | OFlags::NONBLOCK) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        file => file.map_err(|errno| context(errno.into()))?,
    };
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(ACCOUNTS_MAX_BYTES).read_to_end(&mut bytes).map_err(context)?;
    let text = String::from_utf8_lossy(&bytes);
    let account = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then_some(())?;
        let id = fields.nth(1)?.parse().ok()?;
        Some((id, fields.next().and_then(|group| group.parse().ok()).unwrap_or(id)))
    });
    Ok(account)
}

/// A parsed `--chmod`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chmod {
    Octal(u32),
    Symbolic(Vec<Clause>),
}

/// `who` and then operators with permissions: one `u+x` of `u+x,g=r`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clause {
    /// Mask over the nine permission bits.
    who: u32,
    operator: char,
    permissions: Permissions,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Permissions {
    /// Of `rwxXst`.
    Letters(String),
    /// What another class has: `g=u`.
    Of(char),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid --chmod {0:?}: write an octal number up to 07777, or u=rwX,go=rX and the like")]
pub struct InvalidMode(pub String);

impl Chmod {
    pub fn new(text: &str) -> Result<Chmod, InvalidMode> {
        let invalid = || InvalidMode(text.to_owned());
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
            return mode.map(Chmod::Octal).ok_or_else(invalid);
        }
        let clauses = text.split(',').map(clauses).collect::<Option<Vec<_>>>().ok_or_else(invalid)?;
        Ok(Chmod::Symbolic(clauses.concat()))
    }

    /// The mode of a file or directory that had `mode`.
    pub fn apply(&self, mode: u32, directory: bool) -> u32 {
        match self {
            Chmod::Octal(octal) => *octal,
            Chmod::Symbolic(clauses) => clauses.iter().fold(mode, |mode, clause| clause.apply(mode, directory)),
        }
    }
}

fn clauses(text: &str) -> Option<Vec<Clause>> {
    let actions = text.find(['+', '-', '='])?;
    let who = text[..actions].chars().try_fold(0, |who, class| Some(who | class_mask(class)?))?;
    let who = if actions == 0 { 0o777 } else { who };
    let mut clauses = Vec::new();
    let mut rest = &text[actions..];
    while let Some(operator) = rest.chars().next() {
        let end = rest[1..].find(['+', '-', '=']).map_or(rest.len(), |at| at + 1);
        let permissions = match &rest[1..end] {
            "u" | "g" | "o" => Permissions::Of(rest.as_bytes()[1].into()),
            letters if letters.chars().all(|letter| "rwxXst".contains(letter)) => Permissions::Letters(letters.into()),
            _ => return None,
        };
        clauses.push(Clause { who, operator, permissions });
        rest = &rest[end..];
    }
    Some(clauses)
}

fn class_mask(class: char) -> Option<u32> {
    match class {
        'u' => Some(0o700),
        'g' => Some(0o070),
        'o' => Some(0o007),
        'a' => Some(0o777),
        _ => None,
    }
}

impl Clause {
    fn apply(&self, mode: u32, directory: bool) -> u32 {
        let bits = self.bits(mode, directory);
        match self.operator {
            '+' => mode | bits,
            '-' => mode & !bits,
            _ => {
                let special = if self.who & 0o700 != 0 { 0o4000 } else { 0 }
                    | if self.who & 0o070 != 0 { 0o2000 } else { 0 }
                    | if self.who == 0o777 { 0o1000 } else { 0 };
                (mode & !(self.who | special)) | bits
            }
        }
    }

    fn bits(&self, mode: u32, directory: bool) -> u32 {
        let letters = match &self.permissions {
            Permissions::Of(class) => {
                let shift = match class {
                    'u' => 6,
                    'g' => 3,
                    _ => 0,
                };
                return (((mode >> shift) & 7) * 0o111) & self.who;
            }
            Permissions::Letters(letters) => letters,
        };
        letters.chars().fold(0, |bits, letter| {
            bits | match letter {
                'r' => 0o444 & self.who,
                'w' => 0o222 & self.who,
                'x' => 0o111 & self.who,
                'X' if directory || mode & 0o111 != 0 => 0o111 & self.who,
                's' => {
                    (if self.who & 0o700 != 0 { 0o4000 } else { 0 }) | (if self.who & 0o070 != 0 { 0o2000 } else { 0 })
                }
                't' if self.who & 0o007 != 0 => 0o1000,
                _ => 0,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_change_as_chmod_changes_them() {
        for (text, mode, directory, expect) in [
            ("755", 0o600, false, 0o755),
            ("0644", 0o755, true, 0o644),
            ("4755", 0o600, false, 0o4755),
            ("u+x", 0o644, false, 0o744),
            ("+x", 0o644, false, 0o755),
            ("go-r", 0o644, false, 0o600),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("a=r", 0o4755, false, 0o444),
            ("g=u", 0o640, false, 0o660),
            ("u+s,g+s", 0o755, false, 0o6755),
            ("+t", 0o777, true, 0o1777),
            ("u=rw-w+x", 0o000, false, 0o500),
            ("o=", 0o777, false, 0o770),
        ] {
            let chmod = Chmod::new(text).expect(text);
            assert_eq!(format!("{:o}", chmod.apply(mode, directory)), format!("{expect:o}"), "{text} of {mode:o}");
        }
        for bad in ["8", "10000", "", "u", "z+x", "u+q", "u+x,", "u+rg", "-1x"] {
            assert_eq!(Chmod::new(bad), Err(InvalidMode(bad.to_owned())));
        }
    }
}
